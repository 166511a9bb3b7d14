"""Predict bytes per token at the shape of Llama-3.2-1B, in whole bytes and in bits, and count those of a real plan.

    python -m benchmarks bytes [--quick]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch

from benchmarks.report import table
from benchmarks.training.builds import Built, llama_of
from benchmarks.worker.linears import llama_layer
from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.errors import HecompileError, InputError
from hecompile.he.check_tolerances import can_be_verified
from hecompile.he.parameters import LinearParameters
from hecompile.he.weight_norms import WeightNorms, measure_norms
from hecompile.inspection.linear import circuits_without_gradient
from hecompile.passes.offload.quantize import quantize_weight
from hecompile.passes.offload.select_parameters import cheapest_parameters
from hecompile.plan.circuits import effective_bits
from hecompile.plan.costs import CostModel
from hecompile.runtime.client.products import EncryptedProducts
from hecompile.runtime.transports import connect
from hecompile.runtime.worker.process import running_worker

HIDDEN, LAYERS = 2048, 16
PRECISIONS, WEIGHT_BITS = (6.0, 8.0, 10.0), (8, 10)
TARGETS = {(6.0, 8): 2.3e6, (8.0, 8): 2.65e6}
"""Bytes per token of a plan, by effective bits and bits of weights, with bounds that are calibrated."""
CREST = 8.0
"""It decides nothing here: the norm of rows of many features reaches its bound before their largest element does."""
HEADING = "## Bytes per token"
PROSE = f"""\
Predicted for Llama-3.2-1B's shape ({LAYERS} layers, normal random weights, all seven linears adapted, every token with a
gradient, the output head with the client), up and down, forward and backward. Rows are scaled by the proven bounds. Whole
bytes are the cheapest that reach the precision by the same cost model (a link of 1 Gbit/s):
"""
COUNTED = """\
A plan with hidden size {hidden} and 2 layers at 8 effective bits, every product of a training step requested once from a
worker process over TCP, {tokens} tokens at a time. The prediction is that of `inspect`; frames have headers besides:
"""

Choice = Callable[[WeightNorms, float, int], LinearParameters]


def run(quick: bool) -> str:
    """Return Markdown: bytes per token predicted in whole bytes and in bits, and predicted and counted for a real plan."""
    rows: list[list[object]] = []
    for weight_bits, precision in itertools.product(WEIGHT_BITS[: 1 if quick else None], PRECISIONS):
        norms = list(_norms(256 if quick else HIDDEN, weight_bits))
        sizes = [_layer(norms, precision, weight_bits, choice) for choice in (_in_bytes, _in_bits)]
        if None in sizes:
            rows.append([f"{precision:g}", weight_bits, "not reached", "not reached", "", ""])
            continue
        (old_up, old_down), (up, down) = ((LAYERS * a, LAYERS * b) for a, b in filter(None, sizes))
        target = TARGETS.get((precision, weight_bits))
        rows.append([
            f"{precision:g}", weight_bits, _mega(old_up, old_down), _mega(up, down),
            f"{100 * ((up + down) / (old_up + old_down) - 1):+.0f} %", f"≤ {target / 1e6:g}" if target else "",
        ])  # fmt: skip
    predicted = table(
        ["effective bits", "weight bits", "whole bytes: MB up + down", "bits: MB up + down", "", "target"], rows
    )
    hidden, tokens = (128, 32) if quick else (512, 512)
    with llama_of(hidden, 2, 1, tokens) as built:
        counted = _counted(built, tokens)
    return "\n\n".join([HEADING, PROSE, predicted, COUNTED.format(hidden=hidden, tokens=tokens), counted])


def _norms(hidden: int, weight_bits: int) -> Iterator[WeightNorms]:
    """Yield the norms of each circuit of a layer, forward and backward."""
    generator = np.random.default_rng(0)
    for inputs, outputs in llama_layer(hidden).values():
        weight, _ = quantize_weight(generator.standard_normal((outputs, inputs), dtype=np.float32), weight_bits)
        yield from measure_norms(torch.from_numpy(weight))


def _layer(norms: list[WeightNorms], precision: float, weight_bits: int, choose: Choice) -> tuple[int, int] | None:
    """Return the bytes of a token up and down, through every circuit of a layer; None where one does not reach it."""
    try:
        chosen = [choose(each, precision, 1 if weight_bits <= 8 else 2) for each in norms]
    except InputError:
        return None
    return sum(p.bytes_up(1) for p in chosen), sum(p.bytes_down(1) for p in chosen)


def _in_bits(norms: WeightNorms, precision: float, weight_bytes: int) -> LinearParameters:
    return cheapest_parameters(norms, CREST, precision, CostModel(), weight_bytes)


def _in_bytes(norms: WeightNorms, precision: float, weight_bytes: int) -> LinearParameters:
    """Choose as before there were bits: among all pairs of whole bytes."""
    costs, reaching = CostModel(), []
    for upload, reply in itertools.combinations_with_replacement((8, 16, 24, 32), 2):
        try:
            parameters = LinearParameters.from_norms(norms, reply, upload)  # the larger first
        except HecompileError:
            continue
        if can_be_verified(parameters) and effective_bits(parameters, norms, CREST) >= precision:
            reaching.append(parameters)
    if not reaching:
        raise InputError(f"{precision} effective bits cannot be reached")
    return min(reaching, key=lambda p: costs.wire(p, 1) + costs.worker(p, 1, weight_bytes))


def _counted(built: Built, tokens: int) -> str:
    """Request every product of a step and show what the wire counted beside the prediction."""
    bundle, predicted = ClientBundle.open(built.build / CLIENT), built.traffic()
    skipped = circuits_without_gradient(bundle.graph())
    with running_worker(built.build / WORKER) as (_, address):
        transport = connect(address)
        products = EncryptedProducts(bundle, transport)
        for name, parameters in bundle.circuits.items():
            if name not in skipped:
                products.product(name, torch.randn(tokens, parameters.in_features))
        transport.close()
    rows = []
    for way, expected, found in (
        ("up", predicted.bytes_up, products.costs.bytes_up / tokens),
        ("down", predicted.bytes_down, products.costs.bytes_down / tokens),
    ):
        rows.append([way, f"{expected:,}", f"{found:,.0f}", f"{100 * (found / expected - 1):+.2f} %"])
    return table(["bytes per token", "predicted", "counted", "difference (1 % at most)"], rows)


def _mega(up: int, down: int) -> str:
    return f"{up / 1e6:.2f} + {down / 1e6:.2f} = {(up + down) / 1e6:.2f}"
