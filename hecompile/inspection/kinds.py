"""Put together what stands in every layer of a model: names without the layer's number, and ranges of numbers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
ANY = "*"
"""What stands for the number of a layer, or of an expert in it."""


def kind_of(module: str) -> str:
    """Return a module's path with `*` for every number in it: `model.layers.*.mlp.down_proj`."""
    return _NUMBER.sub(ANY, module)


def layer_of(module: str) -> int | None:
    """Return the number of the layer that a module is in, None for one outside of all layers."""
    found = _NUMBER.search(module)
    return None if found is None else int(found[0])


def inside_layer(module: str) -> str:
    """Return a module's path from its layer on, `mlp.down_proj`; the whole path for one outside of all layers."""
    found = _NUMBER.search(module)
    return module if found is None else module[found.end() :].removeprefix(".")


def span(values: Iterable[float], show: Callable[[float], str] = "{:g}".format) -> str:
    """Return the least and the largest of some numbers as one text, a single one where both print alike."""
    known = list(values)
    least, most = show(min(known)), show(max(known))
    return least if least == most else f"{least}–{most}"


def numbers(values: Iterable[int]) -> str:
    """Return whole numbers as ranges: `0–29`, `0, 2–5`; `0, 2, … 28` for many that are equally far from each other."""
    known = sorted(set(values))
    runs: list[list[int]] = []
    for value in known:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    steps = {after - before for before, after in itertools.pairwise(known)}
    if len(runs) > 4 and len(steps) == 1:
        return f"{known[0]}, {known[1]}, … {known[-1]}"
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
