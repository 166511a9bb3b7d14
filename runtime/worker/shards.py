"""Cut a worker bundle to some decoder layers, so that a worker serves those only and says so when a client connects."""

from __future__ import annotations

import dataclasses
import itertools
import re

from hecompile.bundles.worker import KNOWN_ANSWER, WorkerBundle
from hecompile.errors import InputError

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def layer_of(circuit: str) -> int | None:
    """Return the decoder layer that a circuit belongs to; None for a circuit outside all layers."""
    found = _LAYER.search(circuit)
    return int(found.group(1)) if found else None


def layer_count(bundle: WorkerBundle) -> int:
    """Count the decoder layers that have circuits."""
    return 1 + max((layer for layer in map(layer_of, bundle.circuits) if layer is not None), default=0)


def parse_layers(text: str) -> range:
    """Parse `4-7` or `4`. Raises InputError for anything else."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    first, last = (int(found.group(1)), int(found.group(2) or found.group(1))) if found else (1, 0)
    if first > last:
        raise InputError(f"layers {text!r} are not understood: give FIRST-LAST, counted from 0, such as 0-7")
    return range(first, last + 1)


def split_layers(layers: int, shards: int) -> list[range]:
    """Cut `layers` layers into `shards` ranges, as even as possible. Raises InputError for more shards than layers."""
    if not 1 <= shards <= layers:
        raise InputError(f"{layers} layers cannot be split into {shards} shards: use 1 to {layers}")
    bounds = [round(layers * index / shards) for index in range(shards + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def shard(bundle: WorkerBundle, layers: range) -> WorkerBundle:
    """Keep the circuits of some layers and the known answer; circuits outside all layers go with layer 0.

    Raises InputError when there are none, and for layers that the bundle does not have.
    """
    count, wanted = layer_count(bundle), f"{layers.start}-{layers.stop - 1}"
    kept = {
        name: spec
        for name, spec in bundle.circuits.items()
        if name == KNOWN_ANSWER or (layer_of(name) or 0) in layers
    }
    if len(kept) == 1:
        raise InputError(f"the bundle has {count} layers, none of {wanted}: count from 0")
    if layers.stop > count:
        raise InputError(f"the bundle has {count} layers, not all of {wanted}: the last is {count - 1}, counted from 0")
    return dataclasses.replace(bundle, circuits=kept)
