"""Predict what a build takes on disk and in memory from a model's configuration, before anything is exported.

Every decoder linear is on the worker (placement "offload"), those that read one input being one product: query, key and
value of a Llama, its gate and up. There is one each forward, and one backward where an adapter stands before it. A hint has
one row of `rank · ring_dim` words per output of a product. How many bits a word keeps follows from the weights
(`hecompile.plan.hint_bits`): here LIKELY_HINT_BITS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table
from transformers import PretrainedConfig

from hecompile.checkpoint.configuration import family_of
from hecompile.checkpoint.weights import empty_model
from hecompile.he.parameters import CATALOGUE, LinearParameters, RingParameters
from hecompile.he.security import show_bits
from hecompile.inspection.kinds import layer_of
from hecompile.plan.costs import hint_bytes

LIKELY_HINT_BITS = 19
"""Bits of a stored word in the mean, at 8 effective bits (`benchmarks/results/hints.md`)."""
HINT_ROW_GROUP = 8
"""Rows of a hint are padded to a multiple of this on disk."""
_LOGIT_COPIES = 5
"""Arrays of the size of the logits at the peak of a step: logits, log-softmax, their gradients, and a shifted copy."""


def stored_hint_bytes(ring: RingParameters, sizes: Iterable[tuple[int, int]]) -> int:
    """Return the bytes on disk of hints of these (outputs, bits of a word), file headers not counted."""
    return sum(hint_bytes(ring, math.ceil(rows / HINT_ROW_GROUP) * HINT_ROW_GROUP, bits) for rows, bits in sizes)


def hint_file_bytes(ring: RingParameters, circuits: Iterable[LinearParameters]) -> int:
    """Return the bytes of the hint files of these circuits, headers not counted."""
    return stored_hint_bytes(ring, ((circuit.out_features, circuit.hint_bits) for circuit in circuits))


@dataclass(frozen=True)
class ModelSize:
    """Describe the remote products of a model and what stays with the client.

    Attributes:
        products: (in, out) of every product, forward and backward; backward one too many where a block computes attention
            and feed-forward side by side.
        plan_bytes: of the client's plan: float32 embedding, norms, biases and output head.
        vocabulary: how many tokens there are.
    """

    layers: int
    products: tuple[tuple[int, int], ...]
    plan_bytes: int
    vocabulary: int

    @classmethod
    def of(cls, config: PretrainedConfig, adapts: Callable[[str], bool] = lambda path: True) -> ModelSize:
        """Read the sizes off the model that a configuration describes, made without its values.

        adapts: whether the linear of a module path gets an adapter.
        """
        family, forward, offloaded = family_of(config), dict[tuple[str, int], tuple[int, int]](), 0
        adapted: set[tuple[str, int]] = set()
        model = empty_model(config)
        for path, module in model.named_modules():
            parent, _, name = path.rpartition(".")
            number = next((number for number, product in enumerate(family.products) if name in product), None)
            weight = getattr(module, "weight", None)
            if number is None or weight is None:
                continue
            outputs, inputs = reversed(weight.shape) if family.conv1d else weight.shape
            forward[parent, number] = inputs, outputs + forward.get((parent, number), (0, 0))[1]
            offloaded += weight.numel()
            if adapts(path):
                adapted.add((parent, number))
        for path, parameter in model.named_parameters():
            if family.experts is not None and parameter.dim() == 3:  # one matrix [out, in] per expert
                for number, (outputs, inputs) in enumerate([parameter.shape[1:]] * len(parameter)):
                    forward[path, number] = inputs, outputs
                offloaded += parameter.numel()
        # What reads the lowest adapter's input, and all below it, has no backward product.
        order = sorted(forward, key=lambda product: layer_of(product[0]) or 0)
        lowest = next((place for place, product in enumerate(order) if product in adapted), len(order))
        backward = tuple((outputs, inputs) for inputs, outputs in map(forward.__getitem__, order[lowest + 1 :]))
        both = tuple(forward.values()) + backward
        kept = sum(parameter.numel() for parameter in model.parameters()) - offloaded
        scales = sum(outputs for _, outputs in forward.values())
        return cls(config.num_hidden_layers, both, 4 * (kept + scales), config.vocab_size)

    @property
    def hint_rows(self) -> int:
        return sum(outputs for _, outputs in self.products)

    def hint_file_bytes(self, ring: RingParameters, bits: int = LIKELY_HINT_BITS) -> int:
        """Return the bytes of all hints on the client's disk with words of that many bits, file headers not counted."""
        return stored_hint_bytes(ring, ((outputs, bits) for _, outputs in self.products))

    def worker_bytes(self, weight_bits: int | Literal["auto"]) -> int:
        """Return the bytes of the worker bundle: the weights, for forward and backward apart; for "auto" the most."""
        weight_bits = 12 if weight_bits == "auto" else weight_bits
        return sum(inputs * outputs for inputs, outputs in self.products) * (1 if weight_bits <= 8 else 2)

    def client_resident_bytes(self, ring: RingParameters, tokens: int) -> int:
        """Estimate what training keeps in memory.

        Counted: the plan (mapped), A in the FFT domain, the hints of two layers, the logits of `tokens` tokens. Not counted:
        the activations of a long context, and the libraries (0.5 GB).
        """
        two_layers = 2 * self.hint_file_bytes(ring) // self.layers
        matrix = 2 * hint_bytes(ring, max(inputs for inputs, _ in self.products))  # transforms take twice the bytes
        return self.plan_bytes + matrix + two_layers + _LOGIT_COPIES * 4 * tokens * self.vocabulary


def prediction_table(
    size: ModelSize,
    weight_bits: int | Literal["auto"],
    tokens: int,
    ring: RingParameters | None = None,
    *,
    stored_hints: bool = True,
) -> Table:
    """Show storage and memory for one ring, or for each that can be selected.

    tokens: of the largest batch. stored_hints: False where the client keeps none.
    """
    table = Table(title=f"{len(size.products)} products, {size.hint_rows} rows of hints; predicted")
    for heading in ("ring x rank", "security", "hints on the client", "client plan", "client memory", "worker bundle"):
        table.add_column(heading, justify="left" if heading == "ring x rank" else "right")
    for candidate in CATALOGUE.values() if ring is None else (ring,):
        table.add_row(
            f"{candidate.ring_dim} x {candidate.rank}",
            show_bits(candidate.security_bits),
            f"about {megabytes(size.hint_file_bytes(candidate))}" if stored_hints else "none",
            megabytes(size.plan_bytes),
            f"about {megabytes(size.client_resident_bytes(candidate, tokens))}",
            ("up to " if weight_bits == "auto" else "") + megabytes(size.worker_bytes(weight_bits)),
        )
    return table


def prediction_json(size: ModelSize, weight_bits: int | Literal["auto"], tokens: int) -> dict[str, Any]:
    """Return what the table shows, in bytes, as JSON values. docs/command-line.md lists the keys."""
    rings = [
        {
            "ring_dim": ring.ring_dim,
            "rank": ring.rank,
            "security_bits": ring.security_bits,
            "hint_bytes": size.hint_file_bytes(ring),
            "client_memory": size.client_resident_bytes(ring, tokens),
        }
        for ring in CATALOGUE.values()
    ]
    return {
        "what": "prediction",
        "products": len(size.products),
        "hint_rows": size.hint_rows,
        "plan_bytes": size.plan_bytes,
        "worker_bytes": size.worker_bytes(weight_bits),
        "rings": rings,
    }


def megabytes(count: int) -> str:
    """Format a number of bytes for people, in kB, MB or GB."""
    if count < 1e5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
