"""The client: a compiled plan as a torch module. LoRA, attention, norms and loss run here; remote linears do not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import peft
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from hecompile.client_bundle import ClientBundle
from hecompile.errors import InputError
from hecompile.interpreter import Interpreter, graph_inputs
from hecompile.operators import Context
from runtime.products import Products

_IGNORED = -100


class _RemoteLinear(torch.autograd.Function):
    """y = (x·Wᵀ) ⊙ scale forward, dx = (dy ⊙ scale)·W backward, both by `products`, on the rows of real tokens alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, products: Products, linear: str, rows: Tensor) -> Tensor:
        ctx.save_for_backward(scale, rows)
        ctx.products, ctx.linear, ctx.shape = products, linear, x.shape
        flat = x.reshape(-1, x.shape[-1])  # [B·S, in]
        product = products.product(f"{linear}.forward", flat[rows]) * scale  # [T, out]
        result = x.new_zeros(flat.shape[0], product.shape[1])  # [B·S, out]
        result[rows] = product
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        scale, rows = ctx.saved_tensors
        flat = gradients[0].reshape(-1, gradients[0].shape[-1])  # [B·S, out]
        product = ctx.products.product(f"{ctx.linear}.backward", flat[rows] * scale)  # [T, in]
        result = flat.new_zeros(flat.shape[0], product.shape[1])  # [B·S, in]
        result[rows] = product
        return result.view(ctx.shape), None, None, None, None


class EncryptedCausalLM(torch.nn.Module):
    """A `runtime.adapter.AdapterModel` over a client bundle. Its only parameters are the LoRA matrices.

    Args:
        bundle: the opened client bundle.
        products: who computes the remote linears (`EncryptedProducts`, or `CleartextProducts` for debugging).
        seed: of the initial adapter, drawn as PEFT does: A Kaiming-uniform, B zero.
    """

    def __init__(self, bundle: ClientBundle, products: Products, seed: int = 0) -> None:
        super().__init__()
        self.bundle, self.products = bundle, products
        model = bundle.graph()
        self._interpreter = Interpreter(model)
        self._tokens = 0
        self._names: dict[str, str] = {}
        generator = torch.Generator().manual_seed(seed)
        for value in model.graph.inputs:
            name = str(value.name)
            if ".lora_" not in name or value.shape is None:
                continue
            matrix = torch.zeros(value.shape.numpy())
            if ".lora_A." in name:
                torch.nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
            self._names[name] = name.replace(".", "_")
            self.register_parameter(self._names[name], torch.nn.Parameter(matrix))

    @property
    def sequence_buckets(self) -> tuple[int, ...]:
        return tuple(self.bundle.plan.sequence_buckets)

    @property
    def batch_size(self) -> int:
        return self.bundle.plan.batch_size

    @property
    def max_batch_tokens(self) -> int:
        return self.batch_size * self.sequence_buckets[-1]

    @property
    def peft_config(self) -> peft.LoraConfig:
        lora = self.bundle.plan.lora
        return peft.LoraConfig(
            r=lora.r,
            lora_alpha=cast("int", lora.lora_alpha),  # PEFT takes any number and declares an int
            lora_dropout=lora.lora_dropout,
            target_modules=list(lora.target_modules),
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.bundle.plan.base_model,
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        """See `AdapterModel.__call__`. Raises InputError when the batch is larger than the plan was compiled for."""
        batch, length = input_ids.shape
        if batch > self.batch_size or length > self.sequence_buckets[-1]:
            raise InputError(
                f"a batch of {batch} x {length} tokens is larger than the plan's {self.batch_size} x "
                f"{self.sequence_buckets[-1]}; export with a larger --batch-size or --sequence-buckets"
            )
        rows = attention_mask.reshape(-1).nonzero().squeeze(1)  # [T] positions of real tokens in [B·S]
        self._tokens += len(rows)

        def remote(linear: str, x: Tensor, scale: Tensor) -> Tensor:
            return _RemoteLinear.apply(x, scale, self.products, linear, rows)

        inputs = graph_inputs(input_ids, attention_mask) | dict(self.adapter_state())
        logits = self._interpreter.run(inputs, Context(self.training, remote))["logits"]  # [B, S, V]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)
        return CausalLMOutput(loss=loss, logits=logits)

    def adapter_state(self) -> dict[str, torch.nn.Parameter]:
        return {name: getattr(self, attribute) for name, attribute in self._names.items()}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        own = self.adapter_state()
        if state.keys() != own.keys():
            raise InputError(f"the adapter and the plan differ in {', '.join(sorted(state.keys() ^ own.keys())[:3])}")
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)

    def stats(self) -> dict[str, float]:
        return {**self.products.costs.as_dict(), "tokens": float(self._tokens)}
