"""Certificates and tokens: what is made loads, what is damaged is refused, and nothing secret is printed."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from hecompile.errors import InputError
from hecompile.runtime.wire import credentials
from hecompile.runtime.wire.credentials import ClientCredentials, ServerCredentials, make_development_certificates


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_development_certificates(tmp_path / "made")
    return tmp_path / "made"


def server(folder: Path) -> ServerCredentials:
    return ServerCredentials.load(
        folder / credentials.SERVER, folder / credentials.SERVER_KEY, folder / credentials.AUTHORITY,
        folder / credentials.TOKEN,
    )  # fmt: skip


def test_development_certificates_load_and_belong_together(folder: Path) -> None:
    own = server(folder)
    client = ClientCredentials.load(
        folder / credentials.AUTHORITY, folder / credentials.CLIENT, folder / credentials.CLIENT_KEY,
        folder / credentials.TOKEN,
    )  # fmt: skip
    assert own.tls and own.authenticates and client.token is not None
    assert own.accepts(f"Bearer {client.token}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for name in ("server", "client"):
        context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())


def test_only_the_right_token_is_accepted(folder: Path) -> None:
    own = server(folder)
    token = (folder / credentials.TOKEN).read_text().strip()
    for wrong in (None, "", "Bearer", token, f"Basic {token}", f"Bearer {token}x", f"Bearer {token[:-1]}", "Bearer ü"):
        assert not own.accepts(wrong)
    assert ServerCredentials().accepts(None) and not ServerCredentials().authenticates


def test_secrets_are_not_printed(folder: Path) -> None:
    token = (folder / credentials.TOKEN).read_text().strip()
    files = {"certificate": folder / credentials.CLIENT, "key": folder / credentials.CLIENT_KEY}
    client = ClientCredentials.load(token=folder / credentials.TOKEN, **files)
    for text in (repr(client), repr(server(folder))):
        assert token not in text and "PRIVATE" not in text


def test_existing_files_are_not_overwritten(folder: Path) -> None:
    before = (folder / credentials.SERVER_KEY).read_bytes()
    with pytest.raises(InputError, match="is there already"):
        make_development_certificates(folder)
    assert (folder / credentials.SERVER_KEY).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"certificate": "server.pem"}, "both a certificate and its key"),
        ({"client_authority": "authority.pem"}, "over TLS only"),
        ({"certificate": "missing.pem", "key": "server.key"}, "missing.pem cannot be read"),
        ({"certificate": "server.key", "key": "server.key"}, "no certificate"),
        ({"certificate": "server.pem", "key": "server.pem"}, "no private key"),
        ({"tokens": "short"}, "16 characters"),
        ({"tokens": "empty"}, "16 characters"),
    ],
)
def test_bad_files_are_named(folder: Path, arguments: dict[str, str], message: str) -> None:
    (folder / "short").write_text("secret\n")
    (folder / "empty").write_text("\n")
    with pytest.raises(InputError, match=message) as caught:
        ServerCredentials.load(**{name: folder / file for name, file in arguments.items()})
    assert "secret" not in str(caught.value)


def test_a_short_client_token_is_refused(folder: Path) -> None:
    (folder / "short").write_text("secret\n")
    with pytest.raises(InputError, match="short: one token"):
        ClientCredentials.load(token=folder / "short")
