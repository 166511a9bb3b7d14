"""Choose how many bits a word of each circuit's hint keeps: as few as the precision of its product allows."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hecompile.errors import HecompileError
from hecompile.he.hint_rounding import FEWEST_BITS, WORD_BITS
from hecompile.he.parameters import LinearParameters
from hecompile.he.weight_norms import WeightNorms
from hecompile.he.wraps import largest_factor
from hecompile.plan.circuits import SplitPlan, effective_bits

Hints = Literal["stored", "fetched", "computed"]
"""Where hints are: in the client bundle, in the worker's to be fetched, or nowhere, computed with every product."""

HINT_LOSS = 0.05
"""Most effective bits that a rounded hint takes from a product: its noise grows by 3.5 %."""

_MOST_PACKED = 28
"""Above these a file shrinks by less than an eighth, and whole words or their float32 transform are stored."""


def with_hint_bits(plan: SplitPlan, wanted: float) -> SplitPlan:
    """Return the plan with `hint_bits` in the parameters of every circuit; `wanted`: the effective bits asked for."""
    circuits = tuple(
        dataclasses.replace(
            circuit, parameters=fewest_hint_bits(circuit.parameters, circuit.norms, circuit.crest, wanted)
        )
        for circuit in plan.circuits
    )
    return dataclasses.replace(plan, circuits=circuits)


def fewest_hint_bits(parameters: LinearParameters, norms: WeightNorms, crest: float, wanted: float) -> LinearParameters:
    """Return the parameters with the fewest hint bits that take at most HINT_LOSS effective bits and leave `wanted`."""
    before = effective_bits(parameters, norms, crest)
    least = before - HINT_LOSS if before - HINT_LOSS >= wanted or before < wanted else wanted
    for bits in range(FEWEST_BITS, _MOST_PACKED + 1):
        try:
            candidate = dataclasses.replace(parameters, hint_bits=bits)
        except HecompileError:
            continue  # so coarse that no input fits
        if candidate.gain > 1 and largest_factor(candidate, norms) is None:
            continue  # so coarse that a product that wraps could hide in the noise
        if effective_bits(candidate, norms, crest) >= least:
            return candidate
    return dataclasses.replace(parameters, hint_bits=WORD_BITS)
