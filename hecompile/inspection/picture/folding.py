"""Fold a plan into boxes: layers that are built alike become one, operators of a module become one box.

Two layers are alike where the same operators of the same modules take each other's results, and the same values from
outside of the layers. Numbers may differ, and are shown as ranges. Edges from one layer to the next of the same kind are
left out, for the title of the frame says how often it is repeated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import networkx as nx

from hecompile.inspection.kinds import inside_layer, layer_of, numbers, span
from hecompile.inspection.picture.operators import Operator, Quantity

_LINE = 28
"""Characters in a line of a box."""


@dataclass(frozen=True)
class Box:
    """Describe a box: its text, whose it is, the number of its frame, and what crosses at it."""

    title: str
    lines: tuple[str, ...]
    worker: bool
    frame: int | None
    arriving: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()

    @property
    def crosses(self) -> bool:
        return bool(self.arriving or self.leaving)


@dataclass(frozen=True)
class Diagram:
    """Hold boxes by name, in topological order, the edges between them, and the titles of frames around layers."""

    boxes: dict[str, Box]
    edges: tuple[tuple[str, str], ...]
    frames: tuple[str, ...]


def fold(operators: Sequence[Operator]) -> Diagram:
    """Fold a plan's operators, which are in topological order."""
    layers: dict[int, list[Operator]] = {}
    for operator in operators:
        if (layer := layer_of(operator.module)) is not None:
            layers.setdefault(layer, []).append(operator)
    kinds = _kinds(layers)
    folded: dict[str, _Folded] = {}
    for operator in operators:
        if layer_of(operator.module) is None:
            folded[operator.name] = _Folded(operator.name, None, (operator,))
    for frame, alike in enumerate(kinds):
        for same in zip(*alike.values(), strict=True):
            folded.update({operator.name: _Folded(same[0].name, frame, same) for operator in same})
    drawn = _redirect(operators, folded)
    frames = tuple(_frame_title(list(alike), len(layers)) for alike in kinds)
    return _diagram(drawn, _merge(drawn, folded), folded, frames)


@dataclass(frozen=True)
class _Folded:
    """Say which operator stands for one in the picture, in which frame, and for which it stands."""

    name: str
    frame: int | None
    same: tuple[Operator, ...]


def _kinds(layers: dict[int, list[Operator]]) -> list[dict[int, list[Operator]]]:
    """Return the layers that are alike, by number, each as its operators."""
    inside = {operator.name for those in layers.values() for operator in those}
    readers = Counter(name for those in layers.values() for name in {s for operator in those for s in operator.sources})
    shared = {name for name, count in readers.items() if count > 1 and name not in inside}
    kinds: dict[tuple[object, ...], dict[int, list[Operator]]] = {}
    for number, those in layers.items():
        kinds.setdefault(_signature(those, shared), {})[number] = those
    return list(kinds.values())


def _signature(layer: list[Operator], shared: set[str]) -> tuple[object, ...]:
    """Return what layers that are alike have in common.

    shared: operators outside of the layers that several of them read. One layer alone reads the result of the layer before
    it or, in the first one, the embedding.
    """
    index = {operator.name: position for position, operator in enumerate(layer)}

    def source(name: str) -> object:
        return index.get(name, name if name in shared else "before")

    return tuple(
        (
            operator.label,
            operator.worker,
            inside_layer(operator.module),
            tuple(map(source, operator.sources)),
            tuple(quantity.text for quantity in (*operator.facts, *operator.arriving, *operator.leaving)),
        )
        for operator in layer
    )


def _redirect(operators: Sequence[Operator], folded: dict[str, _Folded]) -> list[Operator]:
    """Keep the operators that stand for others, with the sources of all that they stand for.

    Left out are edges to a later layer of the same frame, which its title speaks of, and edges that would lead back.
    """
    number = {operator.name: layer_of(operator.module) for operator in operators}
    position = {operator.name: index for index, operator in enumerate(operators)}
    sources: dict[str, dict[str, None]] = {}
    for operator in operators:
        target = folded[operator.name]
        for name in operator.sources:
            source = folded[name]
            in_frame = source.frame is not None and source.frame == target.frame
            if in_frame and number[name] != number[operator.name]:
                continue
            if position[source.name] < position[target.name]:
                sources.setdefault(target.name, {})[source.name] = None
    return [
        replace(operator, sources=tuple(sources.get(operator.name, ())))
        for operator in operators
        if folded[operator.name].name == operator.name
    ]


def _merge(drawn: Sequence[Operator], folded: dict[str, _Folded]) -> dict[str, str]:
    """Return the box of each operator: what a module does on one side is one box, where no cycle comes of it.

    An operator at which something crosses is a box by itself.
    """
    box_of: dict[str, str] = {}
    boxes = nx.DiGraph()
    latest: dict[tuple[object, ...], str] = {}
    for operator in drawn:
        before = {box_of[name] for name in operator.sources}
        key = (folded[operator.name].frame, operator.module, operator.worker)
        candidate = latest.get(key)
        if candidate is not None and not operator.crosses and _may_join(boxes, candidate, before):
            box_of[operator.name] = candidate
            boxes.add_edges_from((source, candidate) for source in before - {candidate})
            continue
        box_of[operator.name] = operator.name
        boxes.add_node(operator.name)
        boxes.add_edges_from((source, operator.name) for source in before)
        if operator.module and not operator.crosses:
            latest[key] = operator.name
    return box_of


def _may_join(boxes: nx.DiGraph, candidate: str, before: set[str]) -> bool:
    """Tell whether an operator can go into a box: nothing that it reads may depend on that box from outside."""
    return not (before - {candidate}) & nx.descendants(boxes, candidate)


def _diagram(
    drawn: Sequence[Operator], box_of: dict[str, str], folded: dict[str, _Folded], frames: tuple[str, ...]
) -> Diagram:
    members: dict[str, list[Operator]] = {}
    for operator in drawn:
        members.setdefault(box_of[operator.name], []).append(operator)
    boxes = {name: _box(those, folded) for name, those in members.items()}
    pairs = ((box_of[source], box_of[operator.name]) for operator in drawn for source in operator.sources)
    graph = nx.DiGraph(pair for pair in pairs if pair[0] != pair[1])
    graph.add_nodes_from(boxes)
    order = list(nx.lexicographical_topological_sort(graph, key=list(boxes).index))
    return Diagram({name: boxes[name] for name in order}, tuple(graph.edges), frames)


def _box(members: Sequence[Operator], folded: dict[str, _Folded]) -> Box:
    first = members[0]
    same = folded[first.name].same
    counts = Counter(operator.label for operator in members)
    labels = [label if count == 1 else f"{label} × {count}" for label, count in counts.items()]
    title = inside_layer(first.module) or "layer"
    facts = _texts([operator.facts for operator in same])
    return Box(
        title if first.module else first.label,
        (*_wrapped(labels if first.module else []), *facts),
        first.worker,
        folded[first.name].frame,
        _texts([operator.arriving for operator in same]),
        _texts([operator.leaving for operator in same]),
    )


def _wrapped(words: Iterable[str]) -> list[str]:
    """Put words with commas between into lines of at most 28 characters, where no word is longer."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(word) + 2 <= _LINE:
            lines[-1] += f", {word}"
        else:
            lines.append(word)
    return lines


def _texts(layers: Sequence[Sequence[Quantity]]) -> tuple[str, ...]:
    """Return each quantity with its range over the layers, and in how many it is, where not in all."""
    texts = []
    for same in zip(*layers, strict=True):
        found = [quantity.numbers for quantity in same if quantity.numbers]
        if not found:
            continue
        show = byte_span if same[0].is_bytes else span
        text = same[0].text.format(*(show(values) for values in zip(*found, strict=True)))
        texts.append(text if len(found) == len(same) else f"{text} ({len(found)} of {len(same)} layers)")
    return tuple(texts)


def byte_span(values: Iterable[float]) -> str:
    """Return a range of bytes for people, in the unit of the largest."""
    known = list(values)
    unit, name = next(
        ((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e4, "kB")) if max(known) >= unit), (1.0, "B")
    )
    scale = 1e3 if name == "kB" else unit
    return f"{span((value / scale for value in known), '{:.4g}'.format)} {name}"


def _frame_title(layers: Sequence[int], total: int) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}" + ("" if total == 1 else f" (1 of {total})")
    if len(layers) == total:
        return f"layers {numbers(layers)} (× {total}), each on the result of the one before"
    return f"layers {numbers(layers)} (× {len(layers)} of {total}), in the order of their numbers"
