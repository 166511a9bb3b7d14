"""Certificates and tokens: what is made loads, what is damaged is refused, and nothing secret is printed."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from hecompile.errors import InputError
from hecompile.runtime.wire.credentials import ClientCredentials, ServerCredentials
from hecompile.runtime.wire.development_certificates import (
    AUTHORITY,
    CLIENT,
    CLIENT_KEY,
    SERVER,
    SERVER_KEY,
    TOKEN,
    make_development_certificates,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_development_certificates(tmp_path / "made")
    return tmp_path / "made"


def server(folder: Path) -> ServerCredentials:
    return ServerCredentials.load(
        folder / SERVER, folder / SERVER_KEY, folder / AUTHORITY,
        folder / TOKEN,
    )  # fmt: skip


def test_development_certificates_load_and_belong_together(folder: Path) -> None:
    own = server(folder)
    client = ClientCredentials.load(
        folder / AUTHORITY, folder / CLIENT, folder / CLIENT_KEY,
        folder / TOKEN,
    )  # fmt: skip
    assert own.tls and own.authenticates and client.token is not None
    assert own.accepts(f"Bearer {client.token}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for name in ("server", "client"):
        context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())


def test_only_the_right_token_is_accepted(folder: Path) -> None:
    own = server(folder)
    token = (folder / TOKEN).read_text().strip()
    for wrong in (None, "", "Bearer", token, f"Basic {token}", f"Bearer {token}x", f"Bearer {token[:-1]}", "Bearer ü"):
        assert not own.accepts(wrong)
    assert ServerCredentials().accepts(None) and not ServerCredentials().authenticates


def test_secrets_are_not_printed(folder: Path) -> None:
    token = (folder / TOKEN).read_text().strip()
    files = {"certificate": folder / CLIENT, "key": folder / CLIENT_KEY}
    client = ClientCredentials.load(token=folder / TOKEN, **files)
    for text in (repr(client), repr(server(folder))):
        assert token not in text and "PRIVATE" not in text


def test_existing_files_are_not_overwritten(folder: Path) -> None:
    before = (folder / SERVER_KEY).read_bytes()
    with pytest.raises(InputError, match="is there already"):
        make_development_certificates(folder)
    assert (folder / SERVER_KEY).read_bytes() == before


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
    with pytest.raises(InputError, match="short: needs one token"):
        ClientCredentials.load(token=folder / "short")


def test_a_certificate_is_for_the_hosts_and_for_a_month(tmp_path: Path) -> None:
    make_development_certificates(tmp_path, ("worker.example", "10.0.0.7"))
    (certificate,) = x509.load_pem_x509_certificates((tmp_path / SERVER).read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["worker.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1"
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=29) < left <= datetime.timedelta(days=30)


def test_a_host_that_no_certificate_can_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no certificate can be made for the hosts my_host"):
        make_development_certificates(tmp_path / "made", ("my_host",))
    assert not (tmp_path / "made").exists()
