"""Provide a real pretrained chat model: its checkpoint, two batches of real tokens, a trained adapter, exact gradients.

It is SmolLM2-135M-Instruct, which `make demo-real` fetches too, or the Llama with a chat template and at least 256 positions
whose folder $HECOMPILE_REAL_MODEL names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import peft
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from benchmarks.report import ROOT
from hecompile.checkpoint.families import FAMILIES
from hecompile.errors import InputError
from hecompile.models import PRIVATE_TRAIN
from hecompile.models.real import real_checkpoint
from hecompile.runtime.model.data import Example, PadToBucket, eos_and_pad
from hecompile.runtime.model.plaintext import PlaintextPeftModel

FOLDER = "HECOMPILE_REAL_MODEL"
BUCKET, BATCH_SIZE = 96, 15
TRAINED_STEPS, LEARNING_RATE = 20, 2e-4
Batch = dict[str, Tensor]


class Differentiable(Protocol):
    """Give the loss of a batch, differentiable in the LoRA matrices."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> CausalLMOutput: ...
    def adapter_state(self) -> dict[str, torch.nn.Parameter]: ...


@dataclass(frozen=True)
class Gradients:
    """Hold the loss of a batch and the gradient of every LoRA matrix, by name."""

    loss: float
    matrices: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: Differentiable, batch: Batch) -> Gradients:
        """Run a batch forward and backward."""
        for parameter in model.adapter_state().values():
            parameter.grad = None
        loss = model(batch["input_ids"], batch["attention_mask"], batch["labels"]).loss
        assert loss is not None
        loss.backward()
        gradients = {name: p.grad for name, p in model.adapter_state().items() if p.grad is not None}
        return cls(loss.item(), gradients)

    def cosines(self, exact: Gradients) -> Tensor:
        """Return the cosine to the exact gradient, for every matrix."""
        pairs = [(self.matrices[name].flatten(), matrix.flatten()) for name, matrix in exact.matrices.items()]
        return torch.stack([F.cosine_similarity(own.double(), other.double(), dim=0) for own, other in pairs])

    def lengths(self, exact: Gradients) -> Tensor:
        """Return |length / exact length - 1|, for every matrix."""
        ratios = [self.matrices[name].norm() / matrix.norm() for name, matrix in exact.matrices.items()]
        return (torch.stack(ratios) - 1).abs()


class RealModel:
    """Hold the checkpoint in a folder. Raises InputError where $HECOMPILE_REAL_MODEL names none, or none can be fetched."""

    def __init__(self, folder: str | Path | None = None) -> None:
        given = folder or os.environ.get(FOLDER) or real_checkpoint(ROOT / "runs" / "demo-real")
        if not (Path(given) / "config.json").is_file():
            raise InputError(f"{FOLDER}={given}: set it to the folder of a Llama checkpoint with a chat template")
        self.folder = Path(given)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def examples(self) -> list[Example]:
        """Tokenise the private questions as chat; the loss is taken on the answers."""
        lines = [json.loads(line) for line in PRIVATE_TRAIN.read_text(encoding="utf-8").splitlines()]
        return [_chat(self.tokenizer, line["prompt"], line["completion"]) for line in lines]

    def chat_batch(self) -> Batch:
        """Return questions and answers, of which the answers carry the loss."""
        return self._collate(self.examples[:: max(1, len(self.examples) // BATCH_SIZE)][:BATCH_SIZE])

    def prose_batch(self) -> Batch:
        """Return English prose, all of which carries the loss: the beginning of a README of this project, as it once was."""
        text = Path(__file__).with_name("prose.txt").read_text(encoding="utf-8")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        start = self.tokenizer.bos_token_id
        rows = [[start, *ids[at : at + BUCKET - 1]] for at in range(0, 8 * BUCKET, BUCKET)]
        return self._collate([Example(tuple(row), 1, False) for row in rows])

    def batch_of(self, step: int, size: int) -> Batch:
        """Return the batch of a step of training: `size` lines, each epoch in an order of its own."""
        epoch, place = divmod(step * size, len(self.examples))
        order = torch.randperm(len(self.examples), generator=torch.Generator().manual_seed(epoch))
        return self._collate([self.examples[i] for i in order.roll(-place)[:size].tolist()])

    def plaintext(self) -> PlaintextPeftModel:
        """Load the checkpoint with an adapter of rank 8 on all seven linears, in float32."""
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(FAMILIES["llama"].linears), task_type="CAUSAL_LM")
        return PlaintextPeftModel.from_pretrained(self.folder, config, (BUCKET,), BATCH_SIZE)

    def trained_adapter(self, model: PlaintextPeftModel) -> dict[str, Tensor]:
        """Train an adapter for a few steps in plaintext, so that neither A nor B is zero; it stays loaded in `model`."""
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.adapter_state().values(), lr=LEARNING_RATE)
        for step in range(TRAINED_STEPS):
            optimizer.zero_grad()
            model(**self.batch_of(step, 8)).loss.backward()
            optimizer.step()
        return {name: value.detach().clone() for name, value in model.adapter_state().items()}

    def _collate(self, examples: list[Example]) -> Batch:
        return PadToBucket((BUCKET,), eos_and_pad(self.tokenizer)[1])([example.item() for example in examples])


def _chat(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Example:
    question = prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    message = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    start = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer(completion.strip(), add_special_tokens=False)["input_ids"]
    return Example((*start, *answer, eos_and_pad(tokenizer)[0]), len(start), True)
