"""The plaintext baseline: the Hugging Face model with PEFT's own LoRA in float32, behind the trainer's interface."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import peft
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hecompile.errors import InputError


class PlaintextPeftModel(torch.nn.Module):
    """A `runtime.adapter.AdapterModel` that encrypts nothing; encrypted runs are compared with it.

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
        """Load the checkpoint in the directory `model`, with eager attention."""
        if not Path(model).is_dir():
            raise InputError(f"no model directory {model}")
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        return cls(base, peft_config, sequence_buckets, batch_size, max_batch_tokens)

    @property
    def peft_config(self) -> peft.LoraConfig:
        """The LoRA settings, with `target_modules` as PEFT resolved them."""
        return cast("peft.LoraConfig", self._peft.peft_config["default"])

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None
    ) -> CausalLMOutput:
        """See `AdapterModel.__call__`; the logits are right at every unpadded position here."""
        self._tokens += int(attention_mask.sum())
        output = self._peft(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False)
        return CausalLMOutput(loss=output.loss, logits=output.logits)

    def adapter_state(self) -> dict[str, torch.nn.Parameter]:
        """The trainable parameters by their names in PEFT's files, which leave out the adapter's own name."""
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
        """Nothing is encrypted or sent, so that all but `tokens` is zero."""
        names = ("client_crypto_seconds", "worker_seconds", "wire_seconds", "bytes_up", "bytes_down")
        return {**dict.fromkeys(names, 0.0), "tokens": float(self._tokens)}
