"""Run a compiled plan as a torch module: LoRA, attention, norms and loss here, remote linears at the worker."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import onnx_ir as ir
import peft
import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from hecompile.bundles.client import ClientBundle
from hecompile.checkpoint.tokenizer import read_answer_ends
from hecompile.errors import HecompileError, InputError
from hecompile.graph.attention_cache import AttentionCache
from hecompile.graph.head import HEAD_DIGEST, head_digest
from hecompile.graph.interpreter import Interpreter, Observer, packed_graph_inputs
from hecompile.graph.legality import FUSED_CLIENT_PLAN, check_stage
from hecompile.graph.operators import Context
from hecompile.passes.offload.fuse import Fuse
from hecompile.polynomial.domains import DomainMonitor, DomainViolation
from hecompile.runtime.client.kept_prefix import PrefixKeeper
from hecompile.runtime.client.output_head import detach_head
from hecompile.runtime.client.products import Products
from hecompile.runtime.client.range_terms import RangeLoss, WatchedOutput
from hecompile.runtime.client.remote_linear import remote_linear
from hecompile.runtime.model.head import head_cross_entropy, logits_of, scored_positions, scored_targets
from hecompile.runtime.model.per_example import GradientCollector, PerExample


@dataclass(frozen=True)
class _Packed:
    """Hold sequences one after the other, without padding.

    tokens: int64 [T], T the sum of `lengths`. wanted: the positions whose result is wanted, bool [T]; None for all. starts:
    the position of each sequence's first token; None for 0. examples: the number of each; None where it has none.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    wanted: Tensor | None
    starts: tuple[int, ...] | None = None
    examples: tuple[int, ...] | None = None

    @property
    def positions(self) -> Tensor | None:
        """Return the wanted positions, int64 [N]; None for all."""
        if self.wanted is None or bool(self.wanted.all()):
            return None
        return self.wanted.nonzero().squeeze(1)


class EncryptedCausalLM(torch.nn.Module):
    """Run a client bundle as a `hecompile.runtime.model.adapter.AdapterModel`; its only parameters are the LoRA matrices.

    Args:
        bundle: the opened client bundle.
        products: who computes the remote linears (`EncryptedProducts`, or `CleartextProducts` for debugging).
        seed: of the initial adapter, drawn as PEFT does: A Kaiming-uniform, B zero.
        head_dtype: of the products of a local output head (`hecompile.runtime.model.head.LocalHead`).
    """

    def __init__(
        self, bundle: ClientBundle, products: Products, seed: int = 0, head_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.bundle, self.products = bundle, products
        model = Fuse()(bundle.graph()).model
        check_stage(model, FUSED_CLIENT_PLAN)
        head = detach_head(model)
        self._form = head.form
        self._model, self._interpreter = model, Interpreter(model)
        self._head = head.open(model, self._interpreter.constants, products, bundle.ring.ring_dim, head_dtype)
        self._range_loss = RangeLoss(model)
        self.prefix = PrefixKeeper(model, bundle.plan_id)
        self.with_range_terms = False
        self._digest = model.metadata_props.get(HEAD_DIGEST)  # where the head is remote
        if head.weight is not None:
            self._digest = head_digest(self._interpreter.constants[head.weight])
        self._tokens, self._lock = 0, threading.Lock()
        self._names: dict[str, str] = {}
        for name, matrix in _initial_adapter(model, seed).items():
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
            fan_in_fan_out=lora.fan_in_fan_out,
            layers_to_transform=lora.layers_to_transform,
            layers_pattern=lora.layers_pattern,
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.bundle.plan.base_model,
        )

    @property
    def digest(self) -> str:
        return str(self._digest)

    @cached_property
    def answer_ends(self) -> frozenset[int]:
        return read_answer_ends(self.bundle.tokenizer)

    @property
    def concurrent(self) -> bool:
        return True

    @property
    def has_domains(self) -> bool:
        """Say whether the plan has polynomials with domains."""
        return bool(self._range_loss)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        logits_to_keep: Tensor | None = None,
        num_items_in_batch: int | None = None,
        generator: torch.Generator | None = None,
        examples: Tensor | None = None,
    ) -> CausalLMOutput:
        """See `AdapterModel.__call__`, and `PrefixModel` for `examples`. Raises InputError when the batch is larger than the
        plan was compiled for, or its padding is not on the right.

        The sequences run packed, each up to its last wanted position: no later one can matter to it. In the last layer, the
        positions that are not wanted are left out once attention has seen them.
        """
        wanted = scored_positions(labels) if labels is not None else logits_to_keep
        real, packed = self._pack(input_ids, attention_mask, wanted, examples)
        watched = self.with_range_terms and labels is not None
        ranges, observer = self._range_loss.start(packed.lengths) if watched else (None, None)
        hidden = self._hidden(packed, generator, observer=observer)  # [N, H]
        if labels is not None:
            targets = scored_targets(labels)
            count = len(targets) if num_items_in_batch is None else num_items_in_batch
            loss = head_cross_entropy(hidden, self._head, targets, self._form) / count
            return WatchedOutput(loss=loss, ranges=ranges)
        logits = logits_of(hidden, self._head, self._form)  # [N, V]
        if wanted is None:
            everywhere = logits.new_zeros(*input_ids.shape, logits.shape[1])  # [B, S, V]
            everywhere[real] = logits
            logits = everywhere
        return CausalLMOutput(logits=logits)

    def per_example_gradients(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        examples: Tensor | None = None,
    ) -> PerExample:
        """See `PerExampleModel`. The worker sees what it sees of any batch. Raises InputError as `forward` does."""
        scored = scored_positions(labels)
        real, packed = self._pack(input_ids, attention_mask, scored, examples)
        counts = scored.sum(dim=1)
        # The last layer works on the scored positions alone, every other one on all that are sent.
        collector = GradientCollector(self.adapter_state(), [real.sum(dim=1).tolist(), counts.tolist()])
        hidden = self._hidden(packed, generator, trainable=collector.product)  # [N, H]
        loss = head_cross_entropy(hidden, self._head, scored_targets(labels), self._form)
        return collector.backward(loss, counts)

    def outside_domains(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        examples: Tensor | None = None,
    ) -> tuple[DomainViolation, ...]:
        """See `DomainModel`. The worker sees what it sees of any batch, of which nothing is kept."""
        _, packed = self._pack(input_ids, attention_mask, scored_positions(labels))
        monitor = DomainMonitor(self._model, packed.lengths)
        # A failure ends the look: what went before it has been seen, and the reason for looking is to be reported, not this.
        with torch.no_grad(), suppress(HecompileError):
            self._hidden(packed, generator, observer=monitor.observe)
        return monitor.violations

    def next_logits(self, cache: AttentionCache, tokens: Mapping[int, Sequence[int]]) -> Tensor:
        """Compute the logits f32 [n, V] of the token after each of n sequences, in the order given.

        tokens: the next tokens of each sequence, of which `cache` holds what went before and then these too. Raises
        InputError for more sequences or longer ones than the plan was compiled for. After an error, forget the sequences.
        """
        lengths = tuple(len(part) for part in tokens.values())
        starts = tuple(cache.length(sequence) for sequence in tokens)
        longest = max((start + length for start, length in zip(starts, lengths, strict=True)), default=0)
        if not lengths or min(lengths) == 0:
            raise InputError("nothing to continue: give at least one token of each sequence")
        if len(lengths) > self.batch_size or longest > self.sequence_buckets[-1]:
            raise InputError(
                f"{len(lengths)} sequences of up to {longest} tokens are more than the plan's {self.batch_size} of "
                f"{self.sequence_buckets[-1]}; export with a larger --batch-size or --sequence-buckets"
            )
        flat = torch.tensor([token for part in tokens.values() for token in part])  # [T]
        last = torch.zeros(len(flat), dtype=torch.bool)
        last[torch.tensor(lengths).cumsum(0) - 1] = True
        cache.begin(tuple(tokens))
        self._count(len(flat))
        hidden = self._hidden(_Packed(flat, lengths, last, starts), cache=cache)  # [n, H]
        return logits_of(hidden, self._head, self._form)

    def _pack(
        self, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor | None, examples: Tensor | None = None
    ) -> tuple[Tensor, _Packed]:
        """Return which positions of a batch run (bool [B, S]), and their tokens packed."""
        batch, length = input_ids.shape
        if batch > self.batch_size or length > self.sequence_buckets[-1]:
            raise InputError(
                f"a batch of {batch} x {length} tokens is larger than the plan's {self.batch_size} x "
                f"{self.sequence_buckets[-1]}; export with a larger --batch-size or --sequence-buckets"
            )
        real = attention_mask.bool()  # [B, S]
        if bool((real[:, 1:] & ~real[:, :-1]).any()):
            raise InputError("attention_mask has a token after padding; padding must be on the right")
        if wanted is not None:
            real = real & wanted.flip(1).cumsum(dim=1).flip(1).bool()  # up to the last wanted position of each row
        lengths = tuple(count for count in real.sum(dim=1).tolist() if count)
        if not lengths:
            raise InputError(
                "the batch has no token to predict from: attention_mask, labels or logits_to_keep is empty"
            )
        self._count(sum(lengths))
        numbers = None if examples is None else tuple(examples[real.any(dim=1)].tolist())
        return real, _Packed(input_ids[real], lengths, None if wanted is None else wanted[real], examples=numbers)

    def _count(self, tokens: int) -> None:
        with self._lock:
            self._tokens += tokens

    def _hidden(
        self,
        packed: _Packed,
        generator: torch.Generator | None = None,
        cache: AttentionCache | None = None,
        trainable: Callable[[Tensor, Tensor], Tensor] | None = None,
        observer: Observer | None = None,
    ) -> Tensor:
        """Compute the head's input [N, H] at the wanted positions of packed sequences."""

        def remote(linear: str, x: Tensor, scale: Tensor) -> Tensor:
            return remote_linear(x, scale, self.products, linear)

        inputs = packed_graph_inputs(packed.tokens[None], packed.lengths, packed.starts) | dict(self.adapter_state())
        context = Context(self.training, remote, generator, packed.lengths, cache, trainable)
        if (kept := self.prefix.kept) is not None and packed.examples is not None and observer is None:
            return kept.run(inputs, context, packed.examples, packed.positions)[0]
        (hidden,) = self._interpreter.run(inputs, context, observer, packed.positions).values()  # [1, N, H]
        return hidden[0]

    def adapter_state(self) -> dict[str, torch.nn.Parameter]:
        return {name: getattr(self, attribute) for name, attribute in self._names.items()}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        own = self.adapter_state()
        if state.keys() != own.keys():
            raise InputError(f"the adapter and the plan differ in {', '.join(sorted(state.keys() ^ own.keys())[:3])}")
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)

    @property
    def gains(self) -> dict[str, float]:
        return {} if self.products.bounds is None else self.products.bounds.gains

    def lower_gains(self, gains: Mapping[str, float]) -> None:
        if self.products.bounds is not None:
            self.products.bounds.lower(gains)

    def stats(self) -> dict[str, float]:
        return {**self.products.costs.as_dict(), "tokens": float(self._tokens)}


def _initial_adapter(model: ir.Model, seed: int) -> dict[str, Tensor]:
    """Draw the LoRA matrices among the graph's inputs as PEFT does, by name: A [r, in], B [out, r]."""
    generator = torch.Generator().manual_seed(seed)
    matrices: dict[str, Tensor] = {}
    for value in model.graph.inputs:
        name = str(value.name)
        if ".lora_" not in name or value.shape is None:
            continue
        matrices[name] = torch.zeros(value.shape.numpy())
        if ".lora_A." in name:
            torch.nn.init.kaiming_uniform_(matrices[name], a=math.sqrt(5), generator=generator)
    return matrices
