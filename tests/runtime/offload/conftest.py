"""Compile the random two-layer Llama once for the tests that offload it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.compiler.linear import compile_checkpoint
from hecompile.runtime.offload import Offload, offload
from tests.support.tiny import OPTIONS, save_checkpoint
from tests.support.training import BUCKETS, make_tokenizer


@dataclass(frozen=True)
class Compiled:
    """Hold a checkpoint and its build."""

    checkpoint: Path
    build: Path

    def model(self, **settings: object) -> PreTrainedModel:
        """Load the checkpoint anew."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32, **settings)
        return model

    def adapted(self, seed: int = 1, **settings: object) -> peft.PeftModel:
        """Load the checkpoint with an adapter whose A and B are random."""
        torch.manual_seed(seed)
        return peft.get_peft_model(self.model(), lora(**({"init_lora_weights": False} | settings)))

    def offload(self, model: torch.nn.Module) -> Offload:
        return offload(model, self.build / CLIENT, worker_bundle=self.build / WORKER)


def lora(**settings: object) -> peft.LoraConfig:
    given = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**(given | settings))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    directory = tmp_path_factory.mktemp("offload")
    checkpoint = save_checkpoint(directory / "checkpoint")
    options = replace(OPTIONS, effective_bits=11, weight_bits=12, batch_size=4, sequence_buckets=BUCKETS)
    compile_checkpoint(str(checkpoint), directory / "build", options)
    return Compiled(checkpoint, directory / "build")


@pytest.fixture
def offloaded(compiled: Compiled) -> Callable[[torch.nn.Module], Offload]:
    return compiled.offload


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()
