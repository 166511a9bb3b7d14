"""Make certificates and a token for trying out a worker over TLS. This module needs the packages of the extra `network`."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hecompile.errors import InputError
from hecompile.extras import install_command
from hecompile.files import create_private, reason_of
from hecompile.runtime.wire.address import TcpAddress, parse_address
from hecompile.runtime.wire.credentials import ServerCredentials

try:
    import trustme
except ImportError:
    raise InputError(f"development certificates need trustme: {install_command('network')}") from None

AUTHORITY, SERVER, SERVER_KEY = "authority.pem", "server.pem", "server.key"
CLIENT, CLIENT_KEY, TOKEN = "client.pem", "client.key", "token"
_NAMES = (AUTHORITY, SERVER, SERVER_KEY, CLIENT, CLIENT_KEY, TOKEN)
_IGNORE = ".gitignore"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_VALID, _CLOCKS_DIFFER = datetime.timedelta(days=30), datetime.timedelta(hours=1)


@contextmanager
def development_credentials(folder: Path, listen: str) -> Iterator[tuple[ServerCredentials, Callable[[], None]]]:
    """Load the server's credentials in `folder`; made for this machine and the host of `listen` where it has none.

    Yields them and a function to call once they are used. Files that were made are removed at the end where it was not: a
    server that never listened leaves no keys behind.

    Raises:
        InputError: a file is missing, damaged or cannot be written, or `listen` is no address.
    """
    address = parse_address(listen)
    there = set(folder.iterdir()) if folder.is_dir() else None
    used = False

    def keep() -> None:
        nonlocal used
        used = True

    if not any((folder / name).exists() for name in (AUTHORITY, SERVER, SERVER_KEY, TOKEN)):
        hosts = [*_LOOPBACK]
        if isinstance(address, TcpAddress) and address.host not in hosts:
            hosts.append(address.host)
        make_development_certificates(folder, hosts)
    try:
        yield ServerCredentials.load(*(folder / name for name in (SERVER, SERVER_KEY, AUTHORITY, TOKEN))), keep
    finally:
        if not used:
            _remove_made(folder, there)


def _remove_made(folder: Path, there: set[Path] | None) -> None:
    """Remove the files of this module that were not there before, and the folder where it was not."""
    for name in (*_NAMES, _IGNORE):
        if (folder / name) not in (there or ()):
            (folder / name).unlink(missing_ok=True)
    if there is None:
        with contextlib.suppress(OSError):  # something else is in it by now
            folder.rmdir()


def make_development_certificates(directory: Path, hosts: Sequence[str] = _LOOPBACK) -> None:
    """Write an authority, a server's and a client's certificate with their keys, and a token, valid for 30 days.

    All keys are new, on the curve P-256; the authority's is forgotten. Each file can be read by its owner alone: whoever
    has the folder can pose as either side. A .gitignore beside them, unless there is one, keeps them out of repositories.

    Args:
        directory: made if it is missing.
        hosts: names and IP addresses under which clients reach the server.

    Raises:
        InputError: the folder holds such files already or cannot be written, or a host has no name for a certificate.
    """
    present = [name for name in _NAMES if (directory / name).exists()]
    if present:
        raise InputError(f"{directory / present[0]} is there already; remove it or choose another folder")
    authority = trustme.CA(organization_name="hecompile", organization_unit_name="development authority")
    server = _issued(authority, "hecompile worker", hosts)
    client = _issued(authority, "hecompile client", ("client.invalid",))  # a name that no server has
    files = {
        AUTHORITY: authority.cert_pem.bytes(),
        SERVER: server.cert_chain_pems[0].bytes(),
        SERVER_KEY: server.private_key_pem.bytes(),
        CLIENT: client.cert_chain_pems[0].bytes(),
        CLIENT_KEY: client.private_key_pem.bytes(),
        TOKEN: os.urandom(24).hex().encode() + b"\n",
    }
    there = set(directory.iterdir()) if directory.is_dir() else None
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (directory / _IGNORE).exists():  # first: git is never to see a key
            create_private(directory / _IGNORE, "".join(f"/{name}\n" for name in (*_NAMES, _IGNORE)).encode())
        for name, content in files.items():
            create_private(directory / name, content)
    except OSError as error:
        _remove_made(directory, there)
        raise InputError(f"cannot write certificates to {directory}: {reason_of(error)}") from error


def _issued(authority: trustme.CA, name: str, hosts: Sequence[str]) -> trustme.LeafCert:
    now = datetime.datetime.now(datetime.UTC)
    try:
        return authority.issue_cert(
            *hosts, common_name=name, not_before=now - _CLOCKS_DIFFER, not_after=now + _VALID, key_type=trustme.KeyType.ECDSA
        )
    except UnicodeError as error:  # of idna, for letters that a name in a certificate cannot have
        raise InputError(f"no certificate can be made for the hosts {', '.join(hosts)}: {error}") from None
