"""Who may talk to a worker behind Open Inference Protocol v2: TLS, client certificates, tokens, and the options for them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.worker import KNOWN_ANSWER, WorkerBundle
from hecompile.errors import InputError, WorkerError
from hecompile.runtime.transports import connect, open_connection
from hecompile.runtime.transports.oip import OipTransport
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
from hecompile.runtime.worker.process import serve_command, wait_until_listening
from hecompile.runtime.worker.servers.open_server import open_server
from hecompile.runtime.worker.worker import Worker
from tests.support.bundles import PLAN_ID, extreme_planes, extreme_weight, write_bundle

WEIGHT = extreme_weight(8, 6)
CIRCUIT = "layers.0.linear.forward"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> WorkerBundle:
    return write_bundle(tmp_path_factory.mktemp("oip") / "worker", {"layers.0.linear": (WEIGHT, 24, 16)})


@pytest.fixture(scope="module")
def worker(bundle: WorkerBundle) -> Worker:
    return Worker(bundle)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oip") / "keys"
    make_development_certificates(folder)
    return folder


def ask(client: InferenceServerClient, headers: dict[str, str]) -> None:
    """A product by NVIDIA's client, which must be right."""
    planes = extreme_planes(3, 5, 8)
    tensor = InferInput("ciphertext", list(planes.shape), "UINT8")
    tensor.set_data_from_numpy(planes)
    reply = client.infer(CIRCUIT, [tensor], headers=headers).as_numpy("reply")
    np.testing.assert_array_equal(reply, encrypted_linear_reference(planes, WEIGHT, 16))


def assert_answers(transport: OipTransport) -> None:
    planes = extreme_planes(3, 5, 8)
    np.testing.assert_array_equal(
        transport.evaluate(CIRCUIT, planes).planes, encrypted_linear_reference(planes, WEIGHT, 16)
    )


def test_tls_a_client_certificate_and_a_token(worker: Worker, keys: Path) -> None:
    """NVIDIA's client gets through with all three, and with none of them missing."""
    credentials = ServerCredentials.load(*(keys / name for name in (SERVER, SERVER_KEY, AUTHORITY, TOKEN)))
    header = {"authorization": f"Bearer {(keys / TOKEN).read_text().strip()}"}
    files = {
        "root_certificates": keys / AUTHORITY,
        "private_key": keys / CLIENT_KEY,
        "certificate_chain": keys / CLIENT,
    }
    options = {name: str(path) for name, path in files.items()}
    with open_server(worker, "grpcs://127.0.0.1:0", credentials=credentials) as server:
        url = server.address.removeprefix("grpcs://")
        with InferenceServerClient(url, ssl=True, **options) as client:
            ask(client, header)
            for wrong in ({}, {"authorization": "Bearer " + "0" * 48}, {"authorization": header["authorization"][:-1]}):
                with pytest.raises(InferenceServerException, match=r"UNAUTHENTICATED.*a token that the worker knows"):
                    ask(client, wrong)
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                client.is_server_live()
        for missing in ("root_certificates", "private_key"):
            some = {name: path for name, path in options.items() if missing == "root_certificates" or "root" in name}
            if missing == "root_certificates":
                del some["root_certificates"]
            with (
                InferenceServerClient(url, ssl=True, **some) as client,
                pytest.raises(InferenceServerException, match="UNAVAILABLE"),
            ):
                client.is_server_live(headers=header, client_timeout=10)
        with (
            InferenceServerClient(url) as client,
            pytest.raises(InferenceServerException, match="UNAVAILABLE"),
        ):
            client.is_server_live(headers=header, client_timeout=10)
        with InferenceServerClient(url, ssl=True, **options) as client:
            ask(client, header)


@pytest.mark.parametrize("address", ["grpc://0.0.0.0:0", "grpc://[::]:0", "grpc://worker.example:1"])
def test_listening_in_the_clear_for_other_machines_must_be_asked_for(worker: Worker, address: str, keys: Path) -> None:
    with pytest.raises(InputError, match=r"can be reached from other machines without TLS.*allow_plaintext_network"):
        open_server(worker, address)
    tokens = ServerCredentials.load(tokens=keys / TOKEN)
    with pytest.raises(InputError, match="tokens would cross the network in the clear"):
        open_server(worker, address, credentials=tokens, allow_plaintext_network=True)


def test_listening_in_the_clear_for_other_machines_when_asked_for(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    with open_server(worker, "grpc://0.0.0.0:0", allow_plaintext_network=True) as server:
        transport = OipTransport(server.address.replace("0.0.0.0", "127.0.0.1"))
        assert KNOWN_ANSWER in open_connection(transport, PLAN_ID).circuits
        transport.close()
    assert "serves every machine: it requires no token or client certificate" in caplog.text


def test_credentials_that_do_not_go_with_the_address_are_refused(worker: Worker, keys: Path) -> None:
    tls = ServerCredentials.load(keys / SERVER, keys / SERVER_KEY)
    with pytest.raises(InputError, match=r"grpcs://127\.0\.0\.1:0 needs a certificate and its key"):
        open_server(worker, "grpcs://127.0.0.1:0")
    with pytest.raises(InputError, match=r"is not encrypted and shows no certificate; listen on grpcs://"):
        open_server(worker, "grpc://127.0.0.1:0", credentials=tls)
    with pytest.raises(InputError, match=r"tcp:// has neither TLS nor tokens; listen on grpcs://"):
        open_server(worker, "tcp://127.0.0.1:0", credentials=tls)


def test_wrong_credentials_are_refused_and_the_right_ones_served(worker: Worker, keys: Path, tmp_path: Path) -> None:
    make_development_certificates(tmp_path / "other")
    other = tmp_path / "other"
    served = ServerCredentials.load(*(keys / name for name in (SERVER, SERVER_KEY, AUTHORITY, TOKEN)))
    cases = {
        "wrong authority": (
            (other / AUTHORITY, keys / CLIENT, keys / CLIENT_KEY, keys / TOKEN),
            "UNAVAILABLE.*certificate",
        ),
        "authority of the system": ((None, keys / CLIENT, keys / CLIENT_KEY, keys / TOKEN), "UNAVAILABLE.*certificate"),
        "no certificate": ((keys / AUTHORITY, None, None, keys / TOKEN), "UNAVAILABLE.*do the certificates of both"),
        "foreign certificate": ((keys / AUTHORITY, other / CLIENT, other / CLIENT_KEY, keys / TOKEN), "UNAVAILABLE"),
        "wrong token": (
            (keys / AUTHORITY, keys / CLIENT, keys / CLIENT_KEY, other / TOKEN),
            "UNAUTHENTICATED.*a token",
        ),
        "no token": ((keys / AUTHORITY, keys / CLIENT, keys / CLIENT_KEY, None), "UNAUTHENTICATED.*a token"),
    }
    with open_server(worker, "grpcs://127.0.0.1:0", credentials=served) as server:
        for case, (files, message) in cases.items():
            with pytest.raises(WorkerError, match=message) as caught:
                open_connection(OipTransport(server.address, credentials=ClientCredentials.load(*files)), PLAN_ID)
            assert server.address in str(caught.value), case
            assert (keys / TOKEN).read_text().strip() not in str(caught.value)
        with pytest.raises(WorkerError, match="UNAVAILABLE"):
            open_connection(OipTransport(server.address.replace("grpcs", "grpc")), PLAN_ID)
        right = ClientCredentials.load(*(keys / name for name in (AUTHORITY, CLIENT, CLIENT_KEY, TOKEN)))
        transport = connect(server.address, credentials=right)
        open_connection(transport, PLAN_ID)
        assert_answers(transport)
        transport.close()


def test_a_token_is_sent_in_the_clear_to_this_machine_only(worker: Worker, keys: Path) -> None:
    credentials = ClientCredentials.load(token=keys / TOKEN)
    with pytest.raises(InputError, match=r"the token would cross the network in the clear to grpc://worker\.example:1"):
        connect("grpc://worker.example:1", credentials=credentials)
    with pytest.raises(InputError, match="knows no certificates; connect to grpcs://"):
        connect("grpc://127.0.0.1:1", credentials=ClientCredentials.load(authority=keys / AUTHORITY))
    with pytest.raises(InputError, match="sockets have neither TLS nor tokens; connect to grpcs://"):
        connect("tcp://127.0.0.1:1", credentials=credentials)
    with open_server(worker, "grpc://127.0.0.1:0", credentials=ServerCredentials.load(tokens=keys / TOKEN)) as server:
        with pytest.raises(WorkerError, match="UNAUTHENTICATED"):
            open_connection(OipTransport(server.address), PLAN_ID)
        transport = OipTransport(server.address, credentials=credentials)
        open_connection(transport, PLAN_ID)
        assert_answers(transport)
        transport.close()


def test_the_command_line_makes_its_certificates_and_serves_over_tls(bundle: WorkerBundle, tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    command = [*serve_command(bundle.directory), "--listen", "grpcs://localhost:0"]
    command += ["--development-certificates", str(folder)]
    for _ in range(2):  # the second time with those of the first
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            address = wait_until_listening(process)
            assert address is not None
            shown = ClientCredentials.load(*(folder / name for name in (AUTHORITY, CLIENT, CLIENT_KEY, TOKEN)))
            transport = OipTransport(address, credentials=shown)
            open_connection(transport, PLAN_ID)
            assert_answers(transport)
            transport.close()
            process.terminate()
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert (folder / TOKEN).read_text().strip() not in errors
    plain = subprocess.run(
        [*command, "--tls-key", str(folder / SERVER_KEY)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (plain.returncode, plain.stdout) == (2, "")
    assert "--development-certificates stands in place of the four other options" in plain.stderr
