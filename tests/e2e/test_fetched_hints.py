"""Products with fetched hints: over every transport and from a web server, the bytes that `inspect` predicts, bad hints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.hint_files import hint_path
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler import linear as compiler
from hecompile.compiler.linear import compile_checkpoint
from hecompile.errors import InputError, VerificationError, WorkerError
from hecompile.inspection.linear import Totals, products_of
from hecompile.runtime.client.fetched_hints import Fetching
from hecompile.runtime.client.products import EncryptedProducts
from hecompile.runtime.transports import InProcessTransport, Replicas, RetryPolicy, Transport, connect
from hecompile.runtime.transports.hint_url import HintFolder
from hecompile.runtime.wire.credentials import ClientCredentials
from hecompile.runtime.worker.servers.open_server import open_server
from hecompile.runtime.worker.shards import shard
from hecompile.runtime.worker.worker import Worker
from tests.e2e.conftest import Build, copy_of
from tests.support.tiny import OPTIONS, exported, save_checkpoint


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Build:
    directory = tmp_path_factory.mktemp("fetched")
    checkpoint = save_checkpoint(directory / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "export_onnx", lambda model: exported())
        for hints in ("stored", "fetched"):
            compile_checkpoint(str(checkpoint), directory / hints, dataclasses.replace(OPTIONS, hints=hints))
    out = directory / "fetched"
    return Build(out, ClientBundle.open(out / CLIENT), WorkerBundle.open(out / WORKER))


def products_over(build: Build, transport: Transport, **fetching: Any) -> EncryptedProducts:
    return EncryptedProducts(build.client, transport, retry_elsewhere=True, fetching=Fetching(**fetching))


def embedded(build: Build) -> InProcessTransport:
    return InProcessTransport(Worker(build.worker, "torch").exchange)


def a_pass(build: Build, products: EncryptedProducts) -> None:
    """Visit the circuits of a training step, forward and then backward in reverse, and compare with the exact products."""
    trained = [product for product in products_of(build.client) if product.trained]
    forward = [product for product in trained if product.direction == "forward"]
    backward = [product for product in trained if product.direction == "backward"]
    for product in forward + backward[::-1]:
        name = f"{product.linear}.{product.direction}"
        x = torch.randn(11, product.in_features, generator=torch.Generator().manual_seed(1))
        exact = x.double() @ torch.from_numpy(build.worker.weight(name)).double()
        found = products.product(name, x).double()
        assert float((found - exact).norm() / exact.norm()) < 0.01, name


def test_the_hints_are_those_that_would_be_stored_and_the_client_has_their_digests(fetched: Build) -> None:
    stored = fetched.directory.parent / "stored" / CLIENT
    for name, record in fetched.client.fetched.items():
        assert (stored / hint_path(name)).read_bytes() == fetched.worker.hint_file(name).tobytes()
        assert record.bytes == (stored / hint_path(name)).stat().st_size
    assert fetched.client.fetched.keys() == fetched.client.circuits.keys() and len(fetched.client.fetched) == 15
    assert not fetched.client.hints.exists() and not ClientBundle.open(stored).fetched
    assert not (fetched.directory.parent / "stored" / WORKER / "hints").exists()


@pytest.mark.parametrize("scheme", ["inprocess", "tcp", "flight", "grpc"])
def test_over_every_transport_with_the_predicted_bytes(fetched: Build, scheme: str) -> None:
    """With room for two hints alone every pass fetches each once."""
    predicted = Totals.of(fetched.client, products_of(fetched.client)).step_hint_bytes
    largest = sum(sorted(record.bytes for record in fetched.client.fetched.values())[-2:])
    worker = Worker(fetched.worker, "torch")
    with open_server(worker, f"{scheme}://127.0.0.1:0") if scheme != "inprocess" else contextlib.nullcontext() as server:
        asked: list[int] = []
        transport = embedded(fetched) if server is None else connect(server.address)
        products = products_over(fetched, _counting(transport, asked), budget=largest)
        for _ in range(2):
            a_pass(fetched, products)
        products.close()
        assert predicted == sum(record.bytes for name, record in fetched.client.fetched.items() if name in _trained(fetched))
        assert 2 * predicted - largest <= sum(asked) <= 2 * predicted + largest
        assert products.costs.bytes_down > sum(asked)


def test_what_fits_is_fetched_once(fetched: Build) -> None:
    asked: list[int] = []
    products = products_over(fetched, _counting(embedded(fetched), asked))
    for _ in range(3):
        a_pass(fetched, products)
    products.close()
    assert sum(asked) == Totals.of(fetched.client, products_of(fetched.client)).step_hint_bytes


def test_a_wrong_hint_is_refused_and_fetched_elsewhere(fetched: Build, tmp_path: Path) -> None:
    bad = copy_of(fetched, tmp_path / "bad")
    name = next(iter(bad.client.circuits))
    _flip(bad.worker.directory / hint_path(name))
    with pytest.raises(InputError, match=r"hints/.*npy is damaged: its SHA-256"):
        WorkerBundle.open(bad.worker.directory)
    x = torch.ones(3, bad.client.circuits[name].in_features)
    products = products_over(bad, embedded(bad))
    with pytest.raises(VerificationError, match=rf"{name}: the worker: the hint that it serves is not the one of this plan"):
        products.product(name, x)
    products.close()
    workers: dict[str, Callable[[], Transport]] = {"bad": lambda: embedded(bad), "good": lambda: embedded(fetched)}
    products = products_over(fetched, Replicas(workers))
    for circuit, parameters in fetched.client.circuits.items():
        products.product(circuit, torch.ones(3, parameters.in_features))
    products.close()


def test_what_is_not_there_and_what_does_not_fit(fetched: Build, tmp_path: Path) -> None:
    name = next(iter(fetched.client.circuits))
    other = dataclasses.replace(fetched.worker, hints={})
    with pytest.raises(WorkerError, match=r"the worker bundle has no hint of .*--hints fetched"):
        InProcessTransport(Worker(other, "torch").exchange).hint(name, 5)
    with pytest.raises(WorkerError, match=r"needs a file of 5 bytes"):
        embedded(fetched).hint(name, 5)
    half = shard(fetched.worker, range(1))
    with pytest.raises(InputError, match=r"has no hint of .model\.layers\.1"):
        half.hint_file("model.layers.1.mlp.down_proj.forward")
    with pytest.raises(InputError, match=r"connection.hint_cache is 99 bytes, .* take \d+; give at least so many"):
        products_over(fetched, embedded(fetched), budget=99)
    copy = copy_of(fetched, tmp_path / "copy")
    (copy.worker.directory / hint_path(name)).unlink()
    products = products_over(copy, embedded(copy))
    with pytest.raises(WorkerError, match=rf"the hint of {name} cannot be read"):
        products.product(name, torch.ones(3, copy.client.circuits[name].in_features))


def test_a_server_of_the_open_protocol_without_hints_is_named(fetched: Build) -> None:
    other = Worker(dataclasses.replace(fetched.worker, hints={}), "torch")
    with open_server(other, "grpc://127.0.0.1:0") as server:
        products = products_over(fetched, connect(server.address))
        with pytest.raises(WorkerError, match=r"Only `hecompile worker serve` serves hints: .* connection.hints"):
            a_pass(fetched, products)
        products.close()


def test_from_a_web_server(fetched: Build, tmp_path: Path) -> None:
    never = RetryPolicy(1)
    with _web_server(fetched.worker.directory / "hints") as address:
        folder = HintFolder(f"{address}/", ClientCredentials(), 10.0, never)
        products = products_over(fetched, embedded(fetched), folder=folder.hint)
        a_pass(fetched, products)
        products.close()
        assert products.costs.bytes_down > Totals.of(fetched.client, products_of(fetched.client)).step_hint_bytes
        name, record = next(iter(fetched.client.fetched.items()))
        with pytest.raises(WorkerError, match=rf"has {record.bytes} bytes; the hint of {name} has {record.bytes + 9}"):
            folder.hint(name, record.bytes + 9)
        with pytest.raises(WorkerError, match=r"nothing.npy: 404 .*; serve the folder hints of this plan's worker bundle"):
            folder.hint("nothing", 7)
    with pytest.raises(WorkerError, match=r"cannot be fetched: .*refused.* \(asked 1 times\)"):
        folder.hint(name, record.bytes)


def _trained(build: Build) -> set[str]:
    return {f"{product.linear}.{product.direction}" for product in products_of(build.client) if product.trained}


def _counting(transport: Any, asked: list[int]) -> Any:
    """Record the size of every hint that is asked for."""
    hint = transport.hint

    def counted(circuit: str, size: int) -> Any:
        asked.append(size)
        return hint(circuit, size)

    transport.hint = counted
    return transport


def _flip(path: Path) -> None:
    content = np.fromfile(path, dtype=np.uint8)
    content[-1] ^= 1
    content.tofile(path)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        return None


@contextlib.contextmanager
def _web_server(folder: Path) -> Iterator[str]:
    """Serve a folder as any static web server does."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
