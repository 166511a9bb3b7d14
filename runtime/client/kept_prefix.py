"""Run a plan whose lower layers change nothing in training: compute what they give once per example, and keep it.

    first time:   tokens → prefix (the worker is asked) → h, rounded to what is kept → rest
    from then on:                                        h → rest

The prefix holds no LoRA matrix, so no dropout and no gradient, and attention looks back alone: what it gives for an example
depends on its tokens and on nothing else. Only the noise of the encryption differs from one time to the next, and the first
one's is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.errors import InputError
from hecompile.graph.interpreter import Interpreter, packed_graph_inputs
from hecompile.graph.operators import Context
from hecompile.passes.offload.cut_prefix import CutPrefix, PrefixPlan
from hecompile.runtime.client.prefix_store import PrefixStore
from hecompile.runtime.recipes.prefix import PrefixCacheSection

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_BY_POSITION = ("input_ids", "position_ids")


def choose_cut(model: ir.Model, section: PrefixCacheSection, lengths: Sequence[int]) -> PrefixPlan:
    """Choose what is kept of a fused plan: the last constant products too, where the budget holds them for all examples.

    lengths: tokens of each example. Raises InputError where nothing can be kept, or not even of the longest example.
    """
    width = _DTYPES[section.dtype].itemsize
    cuts = [cut for products in (True, False) if (cut := CutPrefix(products)(model)) is not None]
    if not cuts:
        raise InputError("recipe: prefix_cache: adapters change all that this plan's worker computes; drop prefix_cache")
    fitting = [cut for cut in cuts if cut.features * width * sum(lengths) <= section.size]
    chosen = (fitting or cuts[-1:])[0]
    needed = chosen.features * width * max(lengths, default=0)
    if needed > section.size:
        raise InputError(
            f"recipe: prefix_cache.size is {int(section.size):,} bytes, but the longest example of {max(lengths)} tokens "
            f"takes {needed:,}; give more, or drop prefix_cache"
        )
    return chosen


class PrefixKeeper:
    """Keep the prefix of a fused plan (`hecompile.runtime.model.prefix.Prefix`); `kept` is what does, while it does."""

    def __init__(self, model: ir.Model, plan_id: str) -> None:
        self._model, self._plan_id = model, plan_id
        self.kept: KeptPrefix | None = None

    @property
    def active(self) -> bool:
        return self.kept is not None

    def check(self, section: PrefixCacheSection, lengths: Sequence[int]) -> None:
        """See `Prefix`."""
        choose_cut(self._model, section, lengths)

    @contextmanager
    def keep(self, section: PrefixCacheSection, lengths: Sequence[int]) -> Iterator[None]:
        """See `Prefix`."""
        self.kept = kept = KeptPrefix(choose_cut(self._model, section, lengths), section, self._plan_id)
        try:
            yield
        finally:
            self.kept = None
            kept.store.close()


class KeptPrefix:
    """Run the two parts of a plan, the first one once per example.

    Args:
        cut: the parts.
        section: how much is kept, and how.
        plan_id: of the plan, to which what is kept belongs.
    """

    def __init__(self, cut: PrefixPlan, section: PrefixCacheSection, plan_id: str) -> None:
        self._kept, self._plan_id = cut.kept, plan_id
        self._prefix, self._rest = Interpreter(cut.prefix), Interpreter(cut.rest)
        self._dtype = _DTYPES[section.dtype]
        self.store = PrefixStore(section.size, section.directory)

    def run(
        self, inputs: Mapping[str, Tensor], context: Context, examples: Sequence[int], positions: Tensor | None
    ) -> Tensor:
        """Return the plan's output [1, N, H] for packed sequences, as `Interpreter.run` of the whole plan does.

        inputs: the plan's. examples: the number of each of `context.sequences`.
        """
        assert context.sequences is not None
        values = self._values(inputs["input_ids"][0], context, examples)  # [1, T, F] each
        given = {**inputs, **values}
        if positions is not None and not self._rest.can_narrow:
            # All attention was before the cut: no position depends on another any more.
            narrowed = {name: given[name].index_select(1, positions) for name in (*_BY_POSITION, *values)}
            given, positions = {**given, **narrowed}, None
        (hidden,) = self._rest.run(given, context, positions=positions).values()
        return hidden

    def _values(self, tokens: Tensor, context: Context, examples: Sequence[int]) -> dict[str, Tensor]:
        """Return the kept values of packed sequences, tokens int64 [T]: [1, T, F] each, float32."""
        assert context.sequences is not None
        texts = tokens.split(context.sequences)
        digests = [self._digest(text) for text in texts]
        found = [self.store.get(number, digest) for number, digest in zip(examples, digests, strict=True)]
        if missing := [place for place, content in enumerate(found) if content is None]:
            made = self._compute([texts[place] for place in missing], context)
            for place, rows in zip(missing, made, strict=True):
                found[place] = rows.contiguous().view(torch.uint8).numpy().tobytes()
                self.store.put(examples[place], digests[place], found[place] or b"")
        joined = torch.frombuffer(bytearray(b"".join(content or b"" for content in found)), dtype=self._dtype)
        rows = joined.view(len(tokens), -1).float()[None]  # [1, T, all F]
        return dict(zip(self._kept, rows.split(list(self._kept.values()), dim=2), strict=True))

    def _compute(self, texts: Sequence[Tensor], context: Context) -> tuple[Tensor, ...]:
        """Ask the worker for texts that are not kept; return the rows [n, all F] of each, in the dtype that is kept."""
        lengths = tuple(map(len, texts))
        inputs = packed_graph_inputs(torch.cat(tuple(texts))[None], lengths)
        with torch.no_grad():
            values = self._prefix.run(inputs, Context(False, context.remote, sequences=lengths))
        rows = torch.cat([values[name] for name in self._kept], dim=2)[0].to(self._dtype)  # [T, all F]
        return rows.split(lengths)

    def _digest(self, tokens: Tensor) -> bytes:
        """Hash what a record belongs to: plan, kept values, and the tokens as far as they run, from position 0."""
        state = hashlib.blake2b(f"{self._plan_id} {self._kept} {self._dtype}".encode(), digest_size=32)
        state.update(tokens.numpy().tobytes())
        return state.digest()
