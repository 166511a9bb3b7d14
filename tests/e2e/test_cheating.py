"""Catch and name workers that cheat in the middle of training; nothing of the lie gets anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from hecompile.errors import VerificationError
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import EncryptedProducts
from hecompile.runtime.training.train import run_training
from hecompile.runtime.transports import InProcessTransport
from hecompile.runtime.worker.worker import Worker
from tests.e2e.conftest import Build
from tests.support.training import make_recipe

HONEST_STEPS = 1
CIRCUITS_PER_STEP = 4 * 8 - 1  # four layers of four products each way; none is wanted for the embedding


class Cheat:
    """Answer honestly for the first `after` products, and then do `lie` to every one."""

    name = "cheat"

    def __init__(self, build: Build, after: int, lie: Callable[[Cheat, np.ndarray], np.ndarray]) -> None:
        self.honest = Worker(build.worker).engine
        self._left, self._lie = after, lie
        self.previous: dict[tuple[int, ...], np.ndarray] = {}
        self.lied: list[str] = []

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        reply = self.honest.evaluate(circuit, planes)
        if circuit == "known_answer":
            return reply
        self._left -= 1
        if self._left < 0:
            self.lied.append(circuit)
            reply = self._lie(self, reply.copy())
        self.previous[reply.shape] = reply
        return reply


def one_bit(cheat: Cheat, reply: np.ndarray) -> np.ndarray:
    reply[-1, 0, 0] ^= 64
    return reply


def one_row(cheat: Cheat, reply: np.ndarray) -> np.ndarray:
    reply[:, 0] = np.random.default_rng(0).integers(0, 256, reply[:, 0].shape)
    return reply


def old_reply(cheat: Cheat, reply: np.ndarray) -> np.ndarray:
    return cheat.previous.get(reply.shape, np.zeros_like(reply))


def rows_swapped(cheat: Cheat, reply: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(reply[:, ::-1])


@pytest.mark.parametrize("lie", [one_bit, one_row, old_reply, rows_swapped])
def test_a_lie_stops_the_step_and_changes_nothing(
    own_build: Build, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, lie: Callable[[Cheat, np.ndarray], np.ndarray]
) -> None:
    build = own_build
    cheat = Cheat(build, HONEST_STEPS * CIRCUITS_PER_STEP + 5, lie)
    products = EncryptedProducts(build.client, InProcessTransport(Worker(build.worker, cheat).exchange))
    model = EncryptedCausalLM(build.client, products)
    recipe = make_recipe(tmp_path, max_steps=3, save_steps=1, eval_strategy="no", per_device_train_batch_size=4)
    with pytest.raises(VerificationError) as caught:
        run_training(model, tokenizer, recipe)
    message = str(caught.value)
    assert message.startswith(f"step {HONEST_STEPS + 1}: {cheat.lied[0]}: ")
    assert "tokens of the reply are not the product that was asked for" in message
    assert "go on from the last checkpoint" in message
    assert len(cheat.lied) == 1  # nothing was sent after it
    saved = sorted(path.name for path in recipe.training.output_dir.glob("checkpoint-*"))
    assert saved == [f"checkpoint-{HONEST_STEPS}"]
    for value in model.adapter_state().values():
        assert value.grad is None or bool(torch.isfinite(value.grad).all())
    products.close()


def test_what_a_lie_touched_is_not_in_the_adapter(
    own_build: Build, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    build = own_build
    cheat = Cheat(build, 5, one_row)
    products = EncryptedProducts(build.client, InProcessTransport(Worker(build.worker, cheat).exchange))
    model = EncryptedCausalLM(build.client, products)
    before = {name: value.detach().clone() for name, value in model.adapter_state().items()}
    recipe = make_recipe(tmp_path, max_steps=3, eval_strategy="no", per_device_train_batch_size=4)
    with pytest.raises(VerificationError, match="step 1: "):
        run_training(model, tokenizer, recipe)
    assert all(torch.equal(value, before[name]) for name, value in model.adapter_state().items())
