"""Run several micro-batches of a step in flight, with the results of a sequence: bit for bit where nothing is encrypted."""

from __future__ import annotations

import shutil
import threading
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.demonstrations.small import RECIPE
from hecompile.errors import WorkerError
from hecompile.graph.ir import nodes_of_type
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import CleartextProducts
from hecompile.runtime.client.session import open_session
from hecompile.runtime.recipes.training import Recipe, load_recipe
from hecompile.runtime.training.comparison import step_split
from hecompile.runtime.training.metrics import METRICS_FILE, read_metrics
from hecompile.runtime.training.micro_batches import MicroBatches, cut
from hecompile.runtime.training.train import run_training
from hecompile.runtime.worker.servers.sockets import WorkerServer
from hecompile.runtime.worker.worker import Worker
from tests.e2e.conftest import Build

STEPS, ROWS, MICRO_BATCHES = 3, 2, 3


class Dropping(ClientBundle):
    """Open a bundle whose plan has LoRA dropout."""

    def graph(self) -> ir.Model:
        model = super().graph()
        for node in nodes_of_type(model, "Lora"):
            node.attributes["dropout"] = ir.AttrFloat32("dropout", 0.2)
        return model


class Meeting(CleartextProducts):
    """Note how many products are under way at most; each waits, at first, until `expected` are.

    So a run with fewer in flight than it should have does not end (the wait is cut off and the test fails).
    """

    def __init__(self, build: Build, expected: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().__init__(build.client, build.worker)
        self._together = threading.Barrier(expected, timeout=60)
        self._waiting = threading.local()
        self.met = 0

    def product(
        self, circuit: str, x: Tensor, column_scale: Tensor | None = None, row_scale: Tensor | None = None
    ) -> Tensor:
        if not getattr(self._waiting, "done", False):
            self._waiting.done = True
            self._together.wait()
            self.met += 1
        return super().product(circuit, x, column_scale, row_scale)


def model_for(build: Build, adapter: dict[str, Tensor], in_flight: int) -> EncryptedCausalLM:
    bundle = Dropping(**{field.name: getattr(build.client, field.name) for field in fields(build.client)})
    model = EncryptedCausalLM(bundle, Meeting(build, in_flight))
    model.load_adapter_state(adapter)
    return model


def recipe_for(build: Build, output_dir: Path, in_flight: int, *more: str) -> Recipe:
    settings = {
        "model": build.directory / CLIENT, "worker_bundle": build.directory / WORKER, "data.validation_file": "null",
        "training.output_dir": output_dir, "training.max_steps": STEPS, "training.warmup_steps": 1,
        "training.save_steps": 1, "training.save_total_limit": "null", "training.disable_tqdm": "true",
        "training.per_device_train_batch_size": ROWS,
        "training.gradient_accumulation_steps": MICRO_BATCHES, "training.micro_batches_in_flight": in_flight,
    }  # fmt: skip
    return load_recipe(RECIPE, [*(f"{key}={value}" for key, value in settings.items()), *more])


def losses(directory: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in read_metrics(directory / METRICS_FILE)]


def test_in_flight_and_in_sequence_are_the_same_bit_for_bit(
    build: Build, tokenizer: PreTrainedTokenizerBase, adapter: dict[str, Tensor], tmp_path: Path
) -> None:
    """Dropout on, gradients clipped, and a run that resumes in flight what went in sequence before."""
    finals, curves = [], []
    for in_flight in (1, 2, MICRO_BATCHES):
        model = model_for(build, adapter, in_flight)
        directory = tmp_path / str(in_flight)
        torch.manual_seed(5)
        run_training(model, tokenizer, recipe_for(build, directory, in_flight, "training.max_grad_norm=0.1"))
        assert isinstance(model.products, Meeting) and model.products.met == in_flight
        finals.append(model.adapter_state())
        curves.append(losses(directory))
    shutil.rmtree(tmp_path / "1" / f"checkpoint-{STEPS}")
    shutil.rmtree(tmp_path / "1" / f"checkpoint-{STEPS - 1}")
    resumed = model_for(build, adapter, 2)
    run_training(
        resumed, tokenizer, recipe_for(build, tmp_path / "1", 2, "training.max_grad_norm=0.1"), resume=True
    )
    finals.append(resumed.adapter_state())
    curves.append(losses(tmp_path / "1"))
    assert all(norm > 0.1 for _, norm in curves[0]), "nothing was clipped: that was not tested"
    for final, curve in zip(finals[1:], curves[1:], strict=True):
        assert curve == curves[0]
        for name, value in finals[0].items():
            assert torch.equal(final[name], value), name
            assert not torch.equal(value, adapter[name]), f"{name} was not trained"


def test_dropout_is_drawn_per_micro_batch(build: Build, batch: dict[str, Tensor], adapter: dict[str, Tensor]) -> None:
    model = model_for(build, adapter, 1)
    one = [float(model(**batch, generator=torch.Generator().manual_seed(seed)).loss.detach()) for seed in (1, 1, 2)]
    assert one[0] == one[1] != one[2]
    before = torch.get_rng_state()
    model(**batch, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator was drawn from"


def test_a_failure_leaves_no_gradient_and_nothing_at_work(
    build: Build, batch: dict[str, Tensor], adapter: dict[str, Tensor]
) -> None:
    model = model_for(build, adapter, 2)
    calls = {"begun": 0, "ended": 0}

    def share(micro_batch: Any, generator: torch.Generator) -> Tensor:
        calls["begun"] += 1
        if torch.equal(micro_batch["input_ids"], batch["input_ids"][1:2]):
            raise WorkerError("the worker is gone")
        loss = model(**micro_batch).loss
        calls["ended"] += 1
        assert loss is not None
        return loss

    micro_batches = MicroBatches(2)
    model.products._together = threading.Barrier(1)  # type: ignore[attr-defined]  the other one never comes
    with pytest.raises(WorkerError, match="the worker is gone"):
        micro_batches.run(model, cut(batch, 1), share)
    assert calls["begun"] == calls["ended"] + 1, "one was still at work when the failure was raised"
    assert all(parameter.grad is None for parameter in model.parameters())
    micro_batches.close()


def test_encrypted_in_flight_over_a_socket(build: Build, tmp_path: Path) -> None:
    """Connections of its own for each in flight; losses as in sequence up to noise; costs counted once."""
    with WorkerServer(Worker(build.worker), "tcp://127.0.0.1:0") as server:
        splits, curves = [], []
        for in_flight in (1, MICRO_BATCHES):
            recipe = recipe_for(build, tmp_path / str(in_flight), in_flight)
            recipe = recipe.model_copy(update={"worker": server.address, "worker_bundle": None})
            with open_session(recipe) as session:
                run_training(session.model, session.tokenizer, recipe)
            splits.append(step_split(tmp_path / str(in_flight) / METRICS_FILE))
            curves.append([loss for loss, _ in losses(tmp_path / str(in_flight))])
    assert curves[1] == pytest.approx(curves[0], rel=0.01) and curves[1] != curves[0]
    sequence, flight = splits
    assert flight.bytes_up_per_token == pytest.approx(sequence.bytes_up_per_token, rel=1e-3)
    assert flight.bytes_down_per_token == pytest.approx(sequence.bytes_down_per_token, rel=1e-3)
    assert sequence.overlapped == 0 < flight.overlapped
    for split in splits:
        parts = split.client_crypto + split.client_model + split.worker + split.wire
        assert min(split.client_crypto, split.client_model, split.worker, split.wire) > 0 and parts > 0
