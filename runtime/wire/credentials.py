"""Load and check certificates, keys and bearer tokens of the network transports.

Keys and tokens are in no `repr`, and the messages of errors name files only.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from hecompile.errors import InputError
from hecompile.files import reason_of

LEAST_TOKEN_CHARACTERS = 16


@dataclass(frozen=True)
class ServerCredentials:
    """Hold what a worker shows to its clients and requires of them.

    Attributes:
        certificate, key: PEM of the chain and its private key; both None without TLS.
        client_authority: PEM; with it every client must show a certificate that it signed.
        token_digests: SHA-256 of the tokens, one of which every request must carry; where it is empty, none is required.
    """

    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    client_authority: bytes | None = None
    token_digests: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def tls(self) -> bool:
        """Tell whether the worker shows a certificate."""
        return self.certificate is not None

    @property
    def authenticates(self) -> bool:
        """Tell whether clients must show a certificate or a token."""
        return self.client_authority is not None or bool(self.token_digests)

    def accepts(self, authorization: str | None) -> bool:
        """Tell whether the value of an `authorization` header (`Bearer TOKEN`) is known; every value takes the same time."""
        if not self.token_digests:
            return True
        scheme, _, token = (authorization or "").partition(" ")
        digest = hashlib.sha256(token.encode("utf-8", "replace")).digest()
        known = [hmac.compare_digest(digest, own) for own in self.token_digests]
        return scheme.lower() == "bearer" and any(known)

    @classmethod
    def load(
        cls,
        certificate: Path | None = None,
        key: Path | None = None,
        client_authority: Path | None = None,
        tokens: Path | None = None,
    ) -> ServerCredentials:
        """Read files; `tokens` has one per line. Raises InputError for one that is missing, damaged or too short."""
        if (certificate is None) != (key is None):
            raise InputError("TLS needs both a certificate and its key: give both files or neither")
        if client_authority is not None and certificate is None:
            raise InputError("client certificates can be required over TLS only: give a server certificate as well")
        lines = [] if tokens is None else _read(tokens, "token file").decode("utf-8", "replace").split()
        if tokens is not None and (not lines or min(map(len, lines)) < LEAST_TOKEN_CHARACTERS):
            raise InputError(
                f"token file {tokens}: needs one token per line, each of {LEAST_TOKEN_CHARACTERS} characters or more"
            )
        return cls(
            None if certificate is None else _certificates(certificate),
            None if key is None else _key(key),
            None if client_authority is None else _certificates(client_authority),
            tuple(hashlib.sha256(line.encode()).digest() for line in lines),
        )


@dataclass(frozen=True)
class ClientCredentials:
    """Hold what a client shows to workers, and whose certificates it accepts.

    Attributes:
        authority: PEM of the authority that signs workers' certificates; None for the system's own list.
        certificate, key: PEM, for workers that require a certificate of clients.
        token: sent with every request; over TLS or to this machine only.
    """

    authority: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)

    @classmethod
    def load(
        cls,
        authority: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        token: Path | None = None,
    ) -> ClientCredentials:
        """Read files. Raises InputError for one that is missing or damaged."""
        if (certificate is None) != (key is None):
            raise InputError("a client certificate needs its key: give both files or neither")
        text = None if token is None else _read(token, "token file").decode("utf-8", "replace").strip()
        if text is not None and (len(text) < LEAST_TOKEN_CHARACTERS or not text.isascii() or not text.isprintable()):
            raise InputError(f"token file {token}: needs one token, {LEAST_TOKEN_CHARACTERS} printable characters or more")
        return cls(
            None if authority is None else _certificates(authority),
            None if certificate is None else _certificates(certificate),
            None if key is None else _key(key),
            text,
        )


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"the {what} {path} cannot be read: {reason_of(error)}") from None


def _certificates(path: Path) -> bytes:
    content = _read(path, "certificate")
    try:
        x509.load_pem_x509_certificates(content)
    except ValueError:
        raise InputError(f"{path} holds no certificate in PEM format") from None
    return content


def _key(path: Path) -> bytes:
    content = _read(path, "key")
    try:
        serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError):
        raise InputError(f"{path} holds no private key in PEM format without a password") from None
    return content
