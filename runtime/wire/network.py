"""Load the optional packages of the network transports, and check which credentials may go with which address."""

from __future__ import annotations

import importlib
from types import ModuleType

from hecompile.errors import InputError
from hecompile.extras import install_command
from hecompile.runtime.wire.address import TcpAddress
from hecompile.runtime.wire.credentials import ClientCredentials, ServerCredentials

OIP_SCHEMES = ("grpc", "grpcs")
"""Open Inference Protocol v2, in the clear and over TLS."""
FLIGHT_SCHEMES = ("flight", "flights")
"""Arrow Flight, in the clear and over TLS."""


def load_network_module(name: str) -> ModuleType:
    """Import a module of this program that needs packages of the extra `network`. Raises InputError without them."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: tritonclient without its own extra
        missing = getattr(error, "name", None) or str(error).split(";")[0]
        raise InputError(
            f"grpc://, grpcs://, flight:// and flights:// need packages that are not installed ({missing}): "
            f"{install_command('network')}"
        ) from error


def check_server_access(address: TcpAddress, credentials: ServerCredentials, allow_plaintext_network: bool) -> None:
    """Raise InputError when a worker must not listen on `address` with these credentials.

    Without TLS others can read tokens and change replies: beyond this machine that must be allowed explicitly. Tokens are
    refused there in any case, as no client would send one.
    """
    where = f"{address.scheme}://{address.authority}"
    if address.tls and not credentials.tls:
        raise InputError(
            f"{where} needs a certificate and its key; see --tls-certificate or --development-certificates"
        )
    if not address.tls and credentials.tls:
        raise InputError(f"{where} is not encrypted and shows no certificate; listen on {address.scheme}s://")
    if address.tls or address.is_loopback:
        return
    if not allow_plaintext_network:
        raise InputError(
            f"{where} can be reached from other machines without TLS; listen on {address.scheme}s:// with a certificate, "
            "or on 127.0.0.1, or pass --allow-plaintext-network (in a fleet's file: allow_plaintext_network: true)"
        )
    if credentials.token_digests:
        raise InputError(f"tokens would cross the network in the clear to {where}; listen on {address.scheme}s://")


def check_client_access(address: TcpAddress, credentials: ClientCredentials) -> None:
    """Raise InputError when `credentials` must not, or cannot, be shown to `address`."""
    where = f"{address.scheme}://{address.authority}"
    if not address.tls and (credentials.authority is not None or credentials.certificate is not None):
        raise InputError(f"{where} is not encrypted and knows no certificates; connect to {address.scheme}s://")
    if credentials.token is not None and not address.tls and not address.is_loopback:
        raise InputError(f"the token would cross the network in the clear to {where}; connect to {address.scheme}s://")
