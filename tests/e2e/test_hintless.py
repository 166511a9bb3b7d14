"""Train with a plan without stored hints: the worker's W·A is the setup's, bit for bit, and so is the training."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.errors import InputError, VerificationError, WorkerError
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import PublicSeed
from hecompile.he.setup import setup
from hecompile.inspection.linear import circuits_without_gradient, hint_traffic, predicted_traffic
from hecompile.models import TINY_LLAMA
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.hintless import hint_from_planes
from hecompile.runtime.client.products import EncryptedProducts
from hecompile.runtime.transports import InProcessTransport, connect, open_connection
from hecompile.runtime.worker.process import worker_process
from hecompile.runtime.worker.worker import Worker
from tests.e2e.conftest import BATCH_SIZE, SEQUENCE_BUCKETS, Build, copy_of
from tests.e2e.precision.test_gradients import cleartext, gradients


@pytest.fixture(scope="module")
def hintless(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compile the build of `build` again without hints: same seed, same weights."""
    directory = tmp_path_factory.mktemp("hintless") / "tiny"
    options = CompileOptions(
        weight_bits=10,
        batch_size=BATCH_SIZE,
        sequence_buckets=SEQUENCE_BUCKETS,
        public_seed=PublicSeed.from_hex("11" * 32),
        hints="computed",
    )
    compile_checkpoint(str(TINY_LLAMA), directory, options)
    return Build(directory, ClientBundle.open(directory / CLIENT), WorkerBundle.open(directory / WORKER))


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_the_workers_hint_is_that_of_setup(hintless: Build, engine: str) -> None:
    bundle, ring = hintless.client, hintless.client.ring
    transport = InProcessTransport(Worker(hintless.worker, engine).exchange)
    open_connection(transport, bundle.plan_id)
    public = PublicMatrix(ring, bundle.public_seed, max(p.in_features for p in bundle.circuits.values()))
    names = [name for name in bundle.circuits if ".layers.1." in name]
    assert len(names) == 8 and len({bundle.circuits[name].in_features for name in names}) > 2
    for name in names:
        weight = torch.from_numpy(hintless.worker.weight(name).T.copy())  # [out, in]
        planes = transport.setup(name, ring.lattice_dim).planes
        assert torch.equal(hint_from_planes(planes, ring, len(weight)), setup(weight, public)), name


def test_gradients_over_a_worker_process_are_those_of_the_plan(
    build: Build, hintless: Build, batch: dict[str, Tensor], adapter: dict[str, Tensor]
) -> None:
    """They differ by the noise of encryption from those without it; and the counted bytes are the predicted ones."""
    exact = cleartext(build)  # a run with stored hints has noise of its own: the difference of two is at the bound by chance
    exact.load_adapter_state(adapter)
    loss, wanted = gradients(exact, batch)
    with worker_process(hintless.directory / WORKER) as address:
        products = EncryptedProducts(hintless.client, connect(address))
        model = EncryptedCausalLM(hintless.client, products)
        model.load_adapter_state(adapter)
        own_loss, own = gradients(model, batch)
        products.close()
    assert own_loss == pytest.approx(loss, rel=2e-3)
    for name, gradient in own.items():
        assert float(F.cosine_similarity(gradient.flatten(), wanted[name].flatten(), dim=0)) > 0.999, name
    bundle = hintless.client
    skipped = circuits_without_gradient(bundle.graph())
    hints = hint_traffic(bundle.circuits, bundle.ring, skipped)
    tokens = int(batch["attention_mask"].sum())
    replies = products.costs.bytes_down - hints
    assert 0 < replies <= predicted_traffic(bundle.circuits, skipped).bytes_down * tokens * 1.05
    assert hints > replies  # at so few tokens the hints are most of what comes down


def test_nothing_is_stored_and_the_manifest_says_so(build: Build, hintless: Build) -> None:
    assert not hintless.client.hints.exists()
    assert (hintless.client.plan.hints, build.client.plan.hints) == ("none", "stored")
    assert hintless.client.plan_id != build.client.plan_id
    assert not build.worker.has_public_rows and hintless.worker.has_public_rows


def test_the_exact_circuits_take_no_room_of_their_own(build: Build, hintless: Build) -> None:
    """Their weights are the files of the circuits they belong to."""

    sizes = [
        sorted(
            (str(path.relative_to(some.directory)), path.stat().st_size) for path in some.directory.rglob("weight.bin")
        )
        for some in (build, hintless)
    ]
    assert sizes[0] == sizes[1] and len(sizes[0]) > 10


def test_a_worker_with_a_plan_of_stored_hints_computes_none(build: Build) -> None:
    transport = InProcessTransport(Worker(build.worker).exchange)
    open_connection(transport, build.client.plan_id)
    name = next(iter(build.client.circuits))
    with pytest.raises(WorkerError, match=r"no circuit '.*\.exact'; start it on the bundle of this plan"):
        transport.setup(name, build.client.ring.lattice_dim)
    worker = Worker(build.worker)
    with pytest.raises(WorkerError, match="only one that was exported with --no-hints can"):
        worker.setup_product(name)


def test_a_hint_of_another_shape_is_refused(hintless: Build) -> None:
    ring = hintless.client.ring
    with pytest.raises(WorkerError, match=r"expected a hint of uint8"):
        hint_from_planes(np.zeros((3, ring.lattice_dim, 5), dtype=np.uint8), ring, 5)


class WrongWorker:
    """Change one byte of every hint."""

    name = "wrong"

    def __init__(self, worker: Worker) -> None:
        self._engine = worker.engine

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        reply = self._engine.evaluate(circuit, planes).copy()
        if circuit.endswith(".exact"):
            reply[3] ^= 0x55
        return reply


def test_a_wrong_hint_is_refused(hintless: Build, tmp_path: Path) -> None:
    """Else a worker could choose which combination of a one-time secret the result shows."""
    hintless = copy_of(hintless, tmp_path / "own")
    worker = Worker(hintless.worker)
    products = EncryptedProducts(hintless.client, InProcessTransport(Worker(hintless.worker, WrongWorker(worker)).exchange))
    circuit, parameters = next(iter(hintless.client.circuits.items()))
    x = torch.randn(5, parameters.in_features, generator=torch.Generator().manual_seed(0))
    with pytest.raises(VerificationError, match=rf"{circuit}: the worker: the worker's hint is not"):
        products.product(circuit, x)
    assert [path.name for path in hintless.client.checks.glob("spent.*")] == ["spent.0"]


def test_the_public_rows_are_checked_when_the_bundle_is_opened(hintless: Build, tmp_path: Path) -> None:
    copy = tmp_path / "worker"
    shutil.copytree(hintless.worker.directory, copy)
    with (copy / "public_rows.npy").open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(InputError, match=r"public_rows.npy is damaged: its SHA-256"):
        WorkerBundle.open(copy)
