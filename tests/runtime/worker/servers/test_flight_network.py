"""Arrow Flight and who is who: TLS, client certificates, tokens, addresses; workers that vanish or fall silent."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from hecompile.bundles.worker import WorkerBundle
from hecompile.errors import InputError, WorkerError
from hecompile.runtime.transports import connect, open_connection
from hecompile.runtime.wire.credentials import ClientCredentials, ServerCredentials
from hecompile.runtime.worker.servers.open_server import open_server
from hecompile.runtime.worker.worker import Worker
from tests.support.bundles import PLAN_ID, development_credentials, extreme_planes, extreme_weight, write_bundle

pytest.importorskip("grpc")
CIRCUIT = "linear.forward"
TLS, PLAIN = "flights://127.0.0.1:0", "flight://127.0.0.1:0"
Pair = tuple[ServerCredentials, ClientCredentials]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> WorkerBundle:
    return write_bundle(tmp_path_factory.mktemp("network") / "worker", {"linear": (extreme_weight(8, 6), 24, 16)})


@pytest.fixture(scope="module")
def worker(bundle: WorkerBundle) -> Worker:
    return Worker(bundle, "torch")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return development_credentials(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Credentials of the same kind that others made."""
    return development_credentials(tmp_path_factory.mktemp("stranger"))


def assert_served(address: str, credentials: ClientCredentials | None) -> None:
    with contextlib.closing(connect(address, credentials=credentials, reply_timeout=20)) as transport:
        assert open_connection(transport, PLAN_ID).plan_id == PLAN_ID


def assert_refused(address: str, credentials: ClientCredentials | None, message: str) -> None:
    transport = connect(address, credentials=credentials, reply_timeout=20)
    with contextlib.closing(transport), pytest.raises(WorkerError, match=message) as caught:
        transport.hello(PLAN_ID)
    assert credentials is None or credentials.token is None or credentials.token not in str(caught.value)


def without(credentials: ClientCredentials, *names: str) -> ClientCredentials:
    return dataclasses.replace(credentials, **dict.fromkeys(names))


def test_tls_shows_the_worker_to_the_client(worker: Worker, pair: Pair, stranger: Pair) -> None:
    own = dataclasses.replace(pair[0], client_authority=None, token_digests=())
    with open_server(worker, TLS, credentials=own) as server:
        assert_served(server.address, ClientCredentials(authority=pair[1].authority))
        assert_served(server.address.replace("127.0.0.1", "localhost"), ClientCredentials(authority=pair[1].authority))
        unverified = "no worker answers at flights://"
        assert_refused(server.address, ClientCredentials(authority=stranger[1].authority), unverified)
        assert_refused(server.address, None, unverified)  # the system's authorities did not sign it
        assert_refused(server.address.replace("flights", "flight"), None, "no worker answers at flight://")


def test_mutual_tls_serves_clients_of_the_authority_only(worker: Worker, pair: Pair, stranger: Pair) -> None:
    own = dataclasses.replace(pair[0], token_digests=())
    with open_server(worker, TLS, credentials=own) as server:
        assert_served(server.address, pair[1])
        assert_refused(server.address, without(pair[1], "certificate", "key"), "no worker answers")
        other = dataclasses.replace(stranger[1], authority=pair[1].authority)
        assert_refused(server.address, other, "no worker answers")
        assert_served(server.address, pair[1])


@pytest.mark.parametrize("listen", [TLS, PLAIN])
def test_only_the_right_token_is_served(
    worker: Worker, pair: Pair, stranger: Pair, listen: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server_side, client = dataclasses.replace(pair[0], client_authority=None), pair[1]
    if listen == PLAIN:
        server_side = dataclasses.replace(server_side, certificate=None, key=None)
        client = without(client, "authority", "certificate", "key")
    with open_server(worker, listen, credentials=server_side) as server:
        assert_served(server.address, client)
        message = "does not accept this client: this worker needs a bearer token that it knows"
        assert_refused(server.address, without(client, "token"), message)
        assert_refused(server.address, dataclasses.replace(client, token=stranger[1].token), message)
        assert_served(server.address, client)
    assert "refused a call without a known token" in caplog.text
    for token in (pair[1].token, stranger[1].token):
        assert token is not None and token not in caplog.text


def test_credentials_that_would_be_shown_or_unused_are_refused(worker: Worker, pair: Pair) -> None:
    token = ClientCredentials(token=pair[1].token)
    with pytest.raises(InputError, match=r"token would cross the network in the clear to flight://192.0.2.1:7; connect to flights://"):
        connect("flight://192.0.2.1:7", credentials=token)
    with pytest.raises(InputError, match=r"flight://127\.0\.0\.1:7 is not encrypted and knows no certificates; connect to flights://"):
        connect("flight://127.0.0.1:7", credentials=pair[1])
    with pytest.raises(InputError, match="neither TLS nor tokens"):
        connect("tcp://127.0.0.1:7", credentials=token)
    with pytest.raises(InputError, match="is not encrypted and shows no certificate; listen on flights://"):
        open_server(worker, PLAIN, credentials=pair[0])
    with pytest.raises(InputError, match="neither TLS nor tokens"):
        open_server(worker, "tcp://127.0.0.1:0", credentials=pair[0])
    tokens = ServerCredentials(token_digests=pair[0].token_digests)
    with pytest.raises(InputError, match=r"tokens would cross the network in the clear to flight://0\.0\.0\.0:0"):
        open_server(worker, "flight://0.0.0.0:0", credentials=tokens, allow_plaintext_network=True)
    with pytest.raises(InputError, match="needs a certificate and its key; see --tls-certificate"):
        open_server(worker, TLS)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "worker.example"])
def test_plaintext_for_other_machines_must_be_asked_for(worker: Worker, host: str) -> None:
    with pytest.raises(InputError, match=r"can be reached from other machines .* allow_plaintext_network"):
        open_server(worker, f"flight://{host}:0")


def test_other_machines_are_served_over_tls_or_when_asked_for(
    worker: Worker, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    with open_server(worker, "flight://0.0.0.0:0", allow_plaintext_network=True) as server:
        assert_served(server.address.replace("0.0.0.0", "127.0.0.1"), None)
    with open_server(worker, "flights://0.0.0.0:0", credentials=pair[0]) as server:
        assert_served(server.address.replace("0.0.0.0", "127.0.0.1"), pair[1])
    assert "everybody who reaches" not in caplog.text
    anybody = dataclasses.replace(pair[0], client_authority=None, token_digests=())
    with open_server(worker, "flights://0.0.0.0:0", credentials=anybody):
        assert "everybody who reaches flights://0.0.0.0:0 is served" in caplog.text


def test_ipv6(worker: Worker) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    with open_server(worker, "flight://[::1]:0") as server:
        assert server.address.startswith("flight://[::1]:")
        assert_served(server.address, None)


def test_address_in_use_is_named(worker: Worker) -> None:
    with (
        open_server(worker, PLAIN) as server,
        pytest.raises(InputError, match=r"cannot listen on flight://.*: Address already in use; free"),
    ):
        open_server(worker, server.address)


def test_absent_worker_is_named_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = f"flight://127.0.0.1:{listener.getsockname()[1]}"
    assert_refused(free, None, f"no worker answers at {free}: .*refused.*; start one with `hecompile worker serve`")


@contextlib.contextmanager
def worker_process(bundle: WorkerBundle) -> Iterator[tuple[subprocess.Popen[str], str]]:
    program = (
        "import sys; from hecompile.bundles.worker import WorkerBundle; "
        "from hecompile.runtime.worker.servers.serve import serve; from hecompile.runtime.worker.worker import Worker; "
        "serve(Worker(WorkerBundle.open(sys.argv[1]), 'torch'), sys.argv[2], ready=lambda a: print(a, flush=True))"
    )
    arguments = [sys.executable, "-c", program, str(bundle.directory), PLAIN]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_killed_and_silent_workers_are_named(bundle: WorkerBundle) -> None:
    planes = extreme_planes(3, 1, 8)
    with worker_process(bundle) as (process, address):
        transport = connect(address, reply_timeout=1.0)
        open_connection(transport, PLAN_ID)
        process.send_signal(signal.SIGSTOP)
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:  # a running thread could answer before
            time.sleep(0.01)
        with pytest.raises(WorkerError, match=f"the worker at {address} was silent for 1 s; see its log"):
            transport.evaluate(CIRCUIT, planes)
        process.send_signal(signal.SIGCONT)
        transport.evaluate(CIRCUIT, planes)  # one request was given up, not the connection
        process.kill()
        started = time.monotonic()
        with pytest.raises(WorkerError, match=f"the connection to the worker at {address} broke"):
            while time.monotonic() - started < 10:  # the signal takes a moment
                transport.evaluate(CIRCUIT, planes)
        assert time.monotonic() - started < 10
        with pytest.raises(WorkerError, match="is closed; connect again"):
            transport.evaluate(CIRCUIT, planes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_worker_cleanly(bundle: WorkerBundle, number: signal.Signals) -> None:
    with worker_process(bundle) as (process, address):
        transport = connect(address)
        open_connection(transport, PLAN_ID)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        transport.close()
    assert (process.returncode, errors) == (0, "")


def test_missing_grpc_is_named_with_the_remedy(bundle: WorkerBundle) -> None:
    program = (
        "import sys; sys.modules['grpc'] = None\n"
        "from hecompile.errors import InputError\n"
        "from hecompile.runtime.transports import connect\n"
        "try:\n    connect('flight://127.0.0.1:1')\nexcept InputError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "flight:// and flights:// need packages that are not installed (grpc)" in done.stdout
    assert "pip install -e " in done.stdout and "[network]" in done.stdout


def test_replies_are_writable_and_share_no_memory(worker: Worker) -> None:
    """torch warns of arrays that are not."""
    with open_server(worker, PLAIN) as server, contextlib.closing(connect(server.address)) as transport:
        transport.hello(PLAN_ID)
        planes = extreme_planes(3, 4, 8)
        first = transport.evaluate(CIRCUIT, planes).planes
        kept = first.copy()
        second = transport.evaluate(CIRCUIT, planes).planes
        assert first.flags.writeable and not np.shares_memory(first, second)
        second[:] = 0
        np.testing.assert_array_equal(first, kept)
