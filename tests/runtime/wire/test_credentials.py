"""Certificates and tokens: what is made loads, what is damaged is refused, and nothing secret is printed."""

from __future__ import annotations

import datetime
import socket
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from hecompile.errors import InputError
from hecompile.runtime.wire import development_certificates
from hecompile.runtime.wire.credentials import ClientCredentials, ServerCredentials
from hecompile.runtime.wire.development_certificates import (
    AUTHORITY,
    CLIENT,
    CLIENT_KEY,
    SERVER,
    SERVER_KEY,
    TOKEN,
    development_credentials,
    make_development_certificates,
)
from hecompile.runtime.worker.process import serve_command
from tests.support.bundles import extreme_weight, write_bundle


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


FILES = {AUTHORITY, SERVER, SERVER_KEY, CLIENT, CLIENT_KEY, TOKEN, ".gitignore"}


def test_certificates_of_a_server_that_never_listened_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    with pytest.raises(InputError, match="in use"), development_credentials(folder, "grpcs://127.0.0.1:0"):
        assert {path.name for path in folder.iterdir()} == FILES
        raise InputError("the address is in use")
    assert not folder.exists()
    folder.mkdir()
    (folder / "notes").write_text("mine")
    with pytest.raises(InputError), development_credentials(folder, "grpcs://127.0.0.1:0"):
        raise InputError("the address is in use")
    assert [path.name for path in folder.iterdir()] == ["notes"]


def test_certificates_that_are_used_stay_and_serve_again(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    with development_credentials(folder, "grpcs://127.0.0.1:0") as (first, keep):
        keep()
    with pytest.raises(InputError), development_credentials(folder, "grpcs://127.0.0.1:0") as (second, _):
        raise InputError("the address is in use")
    assert {path.name for path in folder.iterdir()} == FILES and second == first


def test_git_does_not_see_them(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    make_development_certificates(tmp_path / "some" / "keys")
    command = ["git", "status", "--porcelain", "-uall"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout == ""


def test_certificates_that_cannot_all_be_written_leave_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = development_certificates.create_private

    def full(path: Path, content: bytes) -> None:
        if path.name == TOKEN:
            raise OSError(28, "No space left on device")
        create(path, content)

    monkeypatch.setattr(development_certificates, "create_private", full)
    with pytest.raises(InputError, match="No space left"):
        make_development_certificates(tmp_path / "keys")
    assert not (tmp_path / "keys").exists()


def test_a_worker_that_cannot_listen_leaves_no_keys(tmp_path: Path) -> None:
    write_bundle(tmp_path / "worker", {"linear": (extreme_weight(8, 6), 24, 16)})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"grpcs://127.0.0.1:{taken.getsockname()[1]}"
        command = [*serve_command(tmp_path / "worker"), "--listen", listen]
        command += ["--development-certificates", str(tmp_path / "keys")]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2 and "cannot listen" in ended.stderr
    assert not (tmp_path / "keys").exists()
