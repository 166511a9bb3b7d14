"""What the transports between machines share: their optional packages, and which credentials go with which address."""

from __future__ import annotations

import importlib
from types import ModuleType

from hecompile.errors import InputError
from hecompile.runtime.wire.address import TcpAddress
from hecompile.runtime.wire.credentials import ClientCredentials, ServerCredentials

OIP_SCHEMES = ("grpc", "grpcs")
"""Open Inference Protocol v2; the second over TLS."""
FLIGHT_SCHEMES = ("flight", "flights")
"""Arrow Flight, likewise."""


def load_network_module(name: str) -> ModuleType:
    """The module `name` of this program, which imports packages of the extra `network`. Raises InputError without them."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: tritonclient without its own extra
        missing = getattr(error, "name", None) or str(error).split(";")[0]
        raise InputError(
            f"grpc://, grpcs://, flight:// and flights:// need packages that are not installed ({missing}): "
            "pip install hecompile[network]"
        ) from error


def check_server_access(address: TcpAddress, credentials: ServerCredentials, allow_plaintext_network: bool) -> None:
    """Raises InputError when a worker must not listen on `address` like that.

    Without TLS others can read tokens and change replies, so that beyond this machine it must be asked for; and tokens are
    not accepted that way at all, as no client would send one.
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
            "or on 127.0.0.1, or pass allow_plaintext_network (--allow-plaintext-network)"
        )
    if credentials.token_digests:
        raise InputError(f"tokens would cross the network in the clear to {where}; listen on {address.scheme}s://")


def check_client_access(address: TcpAddress, credentials: ClientCredentials) -> None:
    """Raises InputError when `credentials` must not, or cannot, be shown to `address`."""
    where = f"{address.scheme}://{address.authority}"
    if not address.tls and (credentials.authority is not None or credentials.certificate is not None):
        raise InputError(f"{where} is not encrypted and knows no certificates; connect to {address.scheme}s://")
    if credentials.token is not None and not address.tls and not address.is_loopback:
        raise InputError(f"the token would cross the network in the clear to {where}; connect to {address.scheme}s://")
