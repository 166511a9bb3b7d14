"""Keep keys and values of earlier tokens, so that a sequence that grows is not computed again.

One cache serves all attention nodes of a graph. They run in the same order every time, so the i-th call of a run gets what
the i-th call of the last run kept. The cache lives on the client and is as private as the text.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from hecompile.errors import InputError


class _GrowingTensor:
    """Keep a tensor [1, heads, L, D] that grows along L in place; room is doubled, so that tokens cost little on average."""

    def __init__(self) -> None:
        self._room: Tensor | None = None
        self.length = 0

    def append(self, part: Tensor) -> Tensor:
        """Append `part` [1, heads, n, D] and return the whole tensor, valid until the next call."""
        end = self.length + part.shape[2]
        if self._room is None or self._room.shape[2] < end:
            batch, heads, _, size = part.shape
            room = part.new_empty(batch, heads, max(end, 2 * self.length), size)
            if self._room is not None:
                room[:, :, : self.length] = self._room[:, :, : self.length]
            self._room = room
        self._room[:, :, self.length : end] = part
        self.length = end
        return self._room[:, :, :end]


class AttentionCache:
    """Keep past keys and values of any number of sequences, each named by a key of the caller's choice."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, list[tuple[_GrowingTensor, _GrowingTensor]]] = {}
        self._running: tuple[Hashable, ...] = ()
        self._node = 0

    def begin(self, sequences: Sequence[Hashable]) -> None:
        """Begin a run over the next tokens of these sequences, packed in this order; new ones start empty.

        Raises InputError where a sequence is named twice.
        """
        self._running, self._node = tuple(sequences), 0
        if len(set(self._running)) < len(self._running):
            raise InputError("a sequence cannot be continued twice in one run")
        for sequence in self._running:
            self._kept.setdefault(sequence, [])

    def extend(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Extend k and v [1, heads, n, D] of each sequence's new tokens to all its tokens, for the next attention node."""
        everything = []
        for sequence, key, value in zip(self._running, keys, values, strict=True):
            nodes = self._kept[sequence]
            if self._node == len(nodes):
                nodes.append((_GrowingTensor(), _GrowingTensor()))
            kept_keys, kept_values = nodes[self._node]
            everything.append((kept_keys.append(key.detach()), kept_values.append(value.detach())))
        self._node += 1
        return everything

    def length(self, sequence: Hashable) -> int:
        """Return how many tokens of a sequence are kept."""
        nodes = self._kept.get(sequence)
        return nodes[0][0].length if nodes else 0

    def forget(self, sequence: Hashable) -> None:
        """Drop everything that is kept of a sequence."""
        self._kept.pop(sequence, None)


def causal_mask(queries: int, keys: int, window: int | None = None) -> Tensor:
    """Return bool [queries, keys] for the last `queries` of `keys` positions: each sees itself and the positions before.

    window: how many of them at most, itself included; None for all.
    """
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)
