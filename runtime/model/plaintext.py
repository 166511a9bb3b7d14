"""Run the plaintext baseline: the Hugging Face model with PEFT's own LoRA in float32, behind the trainer's interface."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import peft
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hecompile.checkpoint.loading import answer_ends, load_model
from hecompile.errors import InputError
from hecompile.files import explain_missing
from hecompile.graph.head import head_digest
from hecompile.runtime.model.head import LogitsForm, linear_cross_entropy, scored_positions, scored_targets
from hecompile.runtime.model.per_example import GradientCollector, PerExample


class PlaintextPeftModel(torch.nn.Module):
    """Run an `AdapterModel` (`hecompile.runtime.model.adapter`) that encrypts nothing; encrypted runs are compared with it.

    `base` must be float32; its modules are changed in place by PEFT. `peft_config` is copied.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        peft_config: peft.LoraConfig,
        sequence_buckets: tuple[int, ...],
        batch_size: int,
        max_batch_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if base.dtype != torch.float32:
            raise InputError(f"the plaintext baseline computes in float32, but the model is {base.dtype}")
        self.sequence_buckets = tuple(sorted(sequence_buckets))
        self.batch_size = batch_size
        self.max_batch_tokens = max_batch_tokens or batch_size * self.sequence_buckets[-1]
        self._form = LogitsForm.of(base.config)
        self._peft = peft.get_peft_model(base, copy.deepcopy(peft_config))
        self._tokens = 0

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        peft_config: peft.LoraConfig,
        sequence_buckets: tuple[int, ...],
        batch_size: int,
        max_batch_tokens: int | None = None,
    ) -> PlaintextPeftModel:
        """Load the checkpoint in the directory `model`, with the attention that transformers prefers (SDPA)."""
        if not Path(model).is_dir():
            raise InputError(f"no model directory {explain_missing(Path(model))}")
        base, _ = load_model(Path(model), "sdpa")
        return cls(base, peft_config, sequence_buckets, batch_size, max_batch_tokens)

    @property
    def peft_config(self) -> peft.LoraConfig:
        """Return the LoRA settings, with `target_modules` as PEFT resolved them."""
        return cast("peft.LoraConfig", self._peft.peft_config["default"])

    @property
    def digest(self) -> str:
        return head_digest(self._head.weight)

    @property
    def answer_ends(self) -> frozenset[int]:
        return answer_ends(self._peft.get_base_model())

    @property
    def concurrent(self) -> bool:
        """Say no: PEFT's dropout draws from torch's own generator."""
        return False

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        logits_to_keep: torch.Tensor | None = None,
        num_items_in_batch: int | None = None,
        generator: torch.Generator | None = None,
    ) -> CausalLMOutput:
        """See `AdapterModel.__call__`. Padding that every row has is cut off, and the head works on the wanted positions
        alone, as on the client."""
        wanted = scored_positions(labels) if labels is not None else logits_to_keep
        width = input_ids.shape[1] if wanted is None else max(1, int(attention_mask.sum(dim=1).max()))
        hidden = self._hidden(input_ids[:, :width], attention_mask[:, :width], generator)  # [B, width, H]
        head = self._head
        if wanted is not None:
            hidden = hidden[wanted[:, :width] & attention_mask[:, :width].bool()]  # [N, H]
        if labels is None:
            return CausalLMOutput(logits=self._form(head(hidden)))
        targets = scored_targets(labels)
        count = len(targets) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=linear_cross_entropy(hidden, head.weight, targets, form=self._form) / count)

    def per_example_gradients(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> PerExample:
        """See `PerExampleModel`."""
        scored = scored_positions(labels)
        width = int(attention_mask.sum(dim=1).max())
        collector = GradientCollector(self.adapter_state(), [[width] * len(input_ids)])
        with contextlib.ExitStack() as hooks:
            for name, module in self._peft.named_modules():
                if ".lora_A." in name or ".lora_B." in name:
                    handle = module.register_forward_hook(lambda own, given, _: collector.product(given[0], own.weight))
                    hooks.callback(handle.remove)
            hidden = self._hidden(input_ids[:, :width], attention_mask[:, :width], generator)  # [B, width, H]
        hidden = hidden[scored[:, :width]]  # [N, H]
        loss = linear_cross_entropy(hidden, self._head.weight, scored_targets(labels), form=self._form)
        return collector.backward(loss, scored.sum(dim=1))

    def _hidden(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generator: torch.Generator | None
    ) -> torch.Tensor:
        self._tokens += int(attention_mask.sum())
        base = cast("PreTrainedModel", self._peft.get_base_model())
        with _drawing_from(generator):
            output = base.get_decoder()(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return cast("torch.Tensor", output.last_hidden_state)

    @property
    def _head(self) -> torch.nn.Linear:
        base = cast("PreTrainedModel", self._peft.get_base_model())
        return cast("torch.nn.Linear", base.get_output_embeddings())

    def adapter_state(self) -> dict[str, torch.nn.Parameter]:
        """Return the trainable parameters by their names in PEFT's files, which leave out the adapter's own name."""
        trainable = {name: parameter for name, parameter in self._peft.named_parameters() if parameter.requires_grad}
        return {name.replace(".default.", "."): parameter for name, parameter in trainable.items()}

    def load_adapter_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy values into the existing parameters; keys and shapes are those of `adapter_state()`."""
        own = self.adapter_state()
        if state.keys() != own.keys():
            different = ", ".join(sorted(state.keys() ^ own.keys()))
            raise InputError(f"the adapter state and the model differ in {different}")
        with torch.no_grad():
            for key, value in state.items():
                own[key].copy_(value)

    def stats(self) -> dict[str, float]:
        """Return the figures; nothing is encrypted or sent, so that all but `tokens` is zero."""
        names = ("client_crypto_seconds", "worker_seconds", "wire_seconds", "bytes_up", "bytes_down", "repeated_rows")
        return {**dict.fromkeys(names, 0.0), "tokens": float(self._tokens)}


@contextlib.contextmanager
def _drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Let torch's own generator go on where `generator` stands, which is moved on; then it is as it was before."""
    if generator is None:
        yield
        return
    with torch.random.fork_rng(devices=()):
        torch.set_rng_state(generator.get_state())
        yield
        generator.set_state(torch.get_rng_state())
