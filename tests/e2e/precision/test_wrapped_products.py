"""Products that wrap never get into a result: such rows are sent again, over whatever transport, forward and backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.errors import InputError, VerificationError
from hecompile.he.parameters import LARGEST_GAIN, LOG_Q
from hecompile.models import TINY_LLAMA
from hecompile.runtime.client.bounds import read_gains
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import EncryptedProducts
from hecompile.runtime.training.metrics import METRICS_FILE, read_metrics
from hecompile.runtime.training.train import run_training
from hecompile.runtime.training.trainer import GAINS_FILE
from hecompile.runtime.transports import InProcessTransport, connect
from hecompile.runtime.worker.process import worker_process
from hecompile.runtime.worker.worker import Worker
from tests.e2e.conftest import BATCH_SIZE, SEQUENCE_BUCKETS, Build
from tests.e2e.precision.test_gradients import gradients
from tests.support.training import make_recipe

FORWARD, BACKWARD = "model.layers.1.mlp.down_proj.forward", "model.layers.1.mlp.gate_proj-up_proj.backward"
TOKENS = 9


def wrapping(bundle: ClientBundle) -> ClientBundle:
    """Return the bundle with so large a gain wherever it may have one that most rows wrap."""
    circuits = {
        name: dataclasses.replace(linear, gain=LARGEST_GAIN) if linear.gain > 1 else linear
        for name, linear in bundle.circuits.items()
    }
    return dataclasses.replace(bundle, circuits=circuits)


@pytest.fixture(scope="module")
def products(build: Build) -> Iterator[EncryptedProducts]:
    """Products over a worker process, under gains of calibration."""
    with worker_process(build.directory / WORKER) as address:
        own = EncryptedProducts(build.client, connect(address))
        yield own
        own.close()


@pytest.fixture(scope="module")
def precise(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compile the small Llama with bits enough for rows under the proven bound, whose noise is larger by the gain."""
    directory = tmp_path_factory.mktemp("precise") / "tiny"
    options = CompileOptions(effective_bits=11, weight_bits=10, batch_size=BATCH_SIZE, sequence_buckets=SEQUENCE_BUCKETS)
    compile_checkpoint(str(TINY_LLAMA), directory, options)
    return Build(directory, ClientBundle.open(directory / CLIENT), WorkerBundle.open(directory / WORKER))


def rows_for(build: Build, circuit: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return ordinary rows [T, in], a row whose product with the longest row of W is as long as it can be, and W."""
    weight = torch.from_numpy(build.worker.weight(circuit).copy()).double().t()  # [out, in]
    generator = torch.Generator().manual_seed(5)
    ordinary = torch.randn((TOKENS, weight.shape[1]), generator=generator)
    return ordinary, weight[weight.norm(dim=1).argmax()].float(), weight


@pytest.mark.parametrize("circuit", [FORWARD, BACKWARD])
@pytest.mark.parametrize("which", [[4], list(range(TOKENS)), []])
def test_rows_that_wrap_are_sent_again(products: EncryptedProducts, build: Build, circuit: str, which: list[int]) -> None:
    x, aligned, weight = rows_for(build, circuit)
    x[which] = aligned * torch.logspace(-3, 2, len(which))[:, None]
    products.bounds = type(products.bounds)(build.client)  # which follow what they see
    linear = products.bounds.parameters(circuit)
    assert linear.gain > 1.1
    before = dataclasses.replace(products.costs)
    wrapped = products._verified(circuit, linear, x, None, None)[0]
    result = products.product(circuit, x)
    exact = x.double() @ weight.t()
    error = (result - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(error.max()) < 2**-7
    without = (wrapped - exact).norm(dim=1) / exact.norm(dim=1)  # as it would be without a second look
    assert [bool(value > 0.1) for value in without] == [token in which for token in range(TOKENS)]
    assert products.costs.repeated_rows - before.repeated_rows == len(which)
    assert products.costs.bytes_up - before.bytes_up > linear.bytes_up(2 * TOKENS + len(which))  # frames of three requests
    assert (products.bounds.parameters(circuit).gain < linear.gain) is bool(which)


def test_a_gain_that_was_lowered_does_not_wrap_again(products: EncryptedProducts, build: Build) -> None:
    x, aligned, _ = rows_for(build, BACKWARD)
    x[0] = aligned
    products.bounds = type(products.bounds)(build.client)
    before = products.costs.repeated_rows
    for _ in range(3):
        products.product(BACKWARD, x[:1])
    assert products.costs.repeated_rows == before + 1 and products.bounds.parameters(BACKWARD).gain == 1


@pytest.mark.parametrize("in_flight", [1, 3])
def test_gradients_are_those_of_proven_bounds_though_most_rows_wrap(
    precise: Build, batch: dict[str, Tensor], adapter: dict[str, Tensor], in_flight: int
) -> None:
    def models_of(bundle: ClientBundle, count: int) -> list[EncryptedCausalLM]:
        products = EncryptedProducts(bundle, InProcessTransport(Worker(precise.worker).exchange))
        models = [EncryptedCausalLM(bundle, products) for _ in range(count)]
        for model in models:
            model.load_adapter_state(adapter)
        return models

    models = models_of(wrapping(precise.client), in_flight)
    with ThreadPoolExecutor(in_flight) as threads:
        found = list(threads.map(lambda model: gradients(model, batch), models))
    assert models[0].stats()["repeated_rows"] > 100
    loss, reference = gradients(models_of(precise.client, 1)[0], batch)
    for own_loss, own in found:
        assert own_loss == pytest.approx(loss, rel=0.01)
        for name, gradient in own.items():  # both have noise; a wrap that gets in leaves nothing alike
            assert float(F.cosine_similarity(gradient.flatten(), reference[name].flatten(), dim=0)) > 0.998, name


def test_a_worker_that_lies_is_caught_and_repeats_nothing(own_build: Build) -> None:
    build = own_build
    x, _, _ = rows_for(build, FORWARD)
    worker = Worker(build.worker)
    honest = worker.engine.evaluate

    def by_half_the_modulus(circuit: str, planes):  # type: ignore[no-untyped-def]
        reply = honest(circuit, planes)
        if circuit == FORWARD:
            reply[-1, 0, 0] ^= 128
        return reply

    worker.engine.evaluate = by_half_the_modulus  # type: ignore[method-assign]
    products = EncryptedProducts(build.client, InProcessTransport(worker.exchange))
    with pytest.raises(VerificationError):
        products.product(FORWARD, x)
    assert products.costs.repeated_rows == 0 and LOG_Q == 32


def test_without_the_vectors_no_result_is_given(own_build: Build, tmp_path: Path) -> None:
    products = EncryptedProducts(own_build.client, InProcessTransport(Worker(own_build.worker).exchange))
    (own_build.directory / CLIENT / "wraps" / f"{FORWARD}.npy").unlink()
    with pytest.raises(InputError, match=r"wrapped products.*export again"):
        products.product(FORWARD, rows_for(own_build, FORWARD)[0])
    with pytest.raises(InputError, match=r"wraps/.* is missing"):
        ClientBundle.open(own_build.directory / CLIENT)


def test_a_run_goes_on_with_the_gains_of_its_checkpoint(
    build: Build, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def model() -> EncryptedCausalLM:
        bundle = wrapping(build.client)
        return EncryptedCausalLM(bundle, EncryptedProducts(bundle, InProcessTransport(Worker(build.worker).exchange)))

    settings = {"save_steps": 1, "eval_strategy": "no", "per_device_train_batch_size": 4}
    first, second = model(), model()
    run_training(first, tokenizer, make_recipe(tmp_path, max_steps=1, **settings))
    run = tmp_path / "run"
    saved = read_gains(run / "checkpoint-1" / GAINS_FILE)
    assert sum(gain == LARGEST_GAIN for gain in saved.values()) <= 1  # of a product that nobody asks for
    run_training(second, tokenizer, make_recipe(tmp_path, max_steps=2, **settings), resume=True)
    before, after = (record["repeated_rows"] for record in read_metrics(run / METRICS_FILE) if "loss" in record)
    assert before > 100 > 10 * after
    assert all(gain <= saved[name] for name, gain in second.gains.items())
    assert not (run / "adapter" / GAINS_FILE).exists()  # which is handed on
