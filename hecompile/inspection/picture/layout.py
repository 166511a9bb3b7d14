"""Place a diagram: rows downwards in the order of computation, the client's boxes left of the worker's.

Rows are longest paths. Frames have rows of their own, and so has every box at which something crosses: its bytes stand
between the two sides. An edge over several rows has a bend in each row between. The vertices of a row are ordered by the
mean place of their neighbours (Sugiyama, Tagawa, Toda: Methods for visual understanding of hierarchical system structures,
1981), then moved towards them as far as the order and their widths let them (isotonic regression). Units are inches.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
from scipy.optimize import isotonic_regression

from hecompile.inspection.picture.folding import Box, Diagram

CHARACTER, LINE = 0.071, 0.155
"""Width of a character and height of a line at the size that boxes are written in."""
_PADDING, _BEND, _SPACE = 0.24, 0.05, 0.14
_ROW_SPACE, _LABEL_GAP = 0.34, 0.5
_SWEEPS = 24
_PULL = 0.1
"""How much every vertex is pulled to the middle of its side, a neighbour being 1."""

Vertex = tuple[str, str, int] | str
"""A box by its name, or the bend of an edge in a row: source, target, row."""


@dataclass(frozen=True)
class Rectangle:
    """Hold a rectangle by its centre and size; y grows upwards."""

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> float:
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        return self.x + self.width / 2

    @property
    def top(self) -> float:
        return self.y + self.height / 2

    @property
    def bottom(self) -> float:
        return self.y - self.height / 2


@dataclass(frozen=True)
class Layout:
    """Hold where everything is.

    Attributes:
        boxes: by name.
        courses: points that each edge goes through, downwards. Across a row it goes straight down, from the row's top to its
            bottom; between two rows there are no boxes.
        gap: left and right end of the room between client and worker.
    """

    boxes: dict[str, Rectangle]
    courses: dict[tuple[str, str], tuple[tuple[float, float], ...]]
    gap: tuple[float, float]
    bounds: tuple[float, float, float, float]


def place(diagram: Diagram) -> Layout:
    """Place the boxes of a diagram, and the courses of its edges."""
    row_of = _rows(diagram)
    neighbours, rows = _bent(diagram, row_of)
    width = {vertex: _width(diagram, vertex) for row in rows for vertex in row}
    sides = {vertex: _is_worker(diagram, vertex) for vertex in width}
    _order(rows, neighbours, sides)
    x = _positions(rows, neighbours, sides, width)
    gap = _separate(diagram, x, width, sides)
    bands = _bands(diagram, rows)
    boxes = {
        name: Rectangle(x[name], sum(bands[row_of[name]]) / 2, width[name], _height(box))
        for name, box in diagram.boxes.items()
    }
    courses = {}
    for source, target in diagram.edges:
        first, last = row_of[source], row_of[target]
        course = [(x[source], bands[first][1])]
        for row in range(first + 1, last):
            course += [(x[(source, target, row)], edge) for edge in bands[row]]
        courses[source, target] = (*course, (x[target], bands[last][0]))
    bounds = (
        min(rectangle.left for rectangle in boxes.values()),
        max(rectangle.right for rectangle in boxes.values()),
        min(rectangle.bottom for rectangle in boxes.values()),
        max(rectangle.top for rectangle in boxes.values()),
    )
    inner = [x[vertex] for vertex in width if not isinstance(vertex, str)]
    bounds = (min([bounds[0], *inner]), max([bounds[1], *inner]), bounds[2], bounds[3])
    return Layout(boxes, courses, gap, bounds)


def _is_worker(diagram: Diagram, vertex: Vertex) -> bool:
    """Tell on whose side a vertex is.

    An edge crosses in the row of the box that has its bytes beside it, so that its bends are on the side of the other one.
    """
    if isinstance(vertex, str):
        return diagram.boxes[vertex].worker
    source, target = diagram.boxes[vertex[0]], diagram.boxes[vertex[1]]
    return source.worker if target.crosses or not source.crosses else target.worker


def _width(diagram: Diagram, vertex: Vertex) -> float:
    if not isinstance(vertex, str):
        return _BEND
    box = diagram.boxes[vertex]
    return CHARACTER * max(len(line) for line in (box.title, *box.lines)) + _PADDING


def _height(box: Box) -> float:
    return LINE * (1 + len(box.lines)) + _PADDING / 2


def _rows(diagram: Diagram) -> dict[str, int]:
    """Return the row of each box: below all that it reads, frames apart from each other and from what is around them."""
    graph = nx.DiGraph(diagram.edges)
    graph.add_nodes_from(diagram.boxes)
    phase = dict.fromkeys(diagram.boxes, 0)
    for name, box in diagram.boxes.items():  # in topological order
        before = [phase[source] for source in graph.predecessors(name)]
        inside = [2 * box.frame + 1] if box.frame is not None else []
        phase[name] = max([0, *inside, *(p + 1 if p % 2 and not inside else p for p in before)])
    row_of: dict[str, int] = {}
    start = 0
    for current in sorted(set(phase.values())):
        taken: set[int] = set()
        for name in (name for name in diagram.boxes if phase[name] == current):
            row = max([start, *(row_of[source] + 1 for source in graph.predecessors(name))])
            while diagram.boxes[name].crosses and row in taken:
                row += 1
            row_of[name] = row
            if diagram.boxes[name].crosses:
                taken.add(row)
        start = 1 + max(row_of.values())
    return row_of


def _bent(
    diagram: Diagram, row_of: Mapping[str, int]
) -> tuple[dict[Vertex, list[tuple[Vertex, int]]], list[list[Vertex]]]:
    """Return the neighbours of every vertex, each with −1 above or 1 below, and the vertices row by row."""
    neighbours: dict[Vertex, list[tuple[Vertex, int]]] = defaultdict(list)
    rows: list[list[Vertex]] = [[] for _ in range(1 + max(row_of.values()))]
    for name in diagram.boxes:
        rows[row_of[name]].append(name)
    for source, target in diagram.edges:
        chain: list[Vertex] = [source]
        for row in range(row_of[source] + 1, row_of[target]):
            chain.append((source, target, row))
            rows[row].append(chain[-1])
        chain.append(target)
        for above, below in itertools.pairwise(chain):
            neighbours[above].append((below, 1))
            neighbours[below].append((above, -1))
    return neighbours, rows


def _order(rows: list[list[Vertex]], neighbours: Mapping[Vertex, Sequence[tuple[Vertex, int]]], sides: Mapping) -> None:
    """Order each row by the mean place of the neighbours, the worker's vertices last; downwards and upwards in turn."""
    place_of = {vertex: index / max(len(row), 1) + sides[vertex] for row in rows for index, vertex in enumerate(row)}
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            mean = {}
            for vertex in row:
                found = [place_of[other] for other, way in neighbours[vertex] if way == (-1 if down else 1)]
                mean[vertex] = sum(found) / len(found) if found else place_of[vertex]
            row.sort(key=lambda vertex: (sides[vertex], mean[vertex]))
            for side in (False, True):
                those = [vertex for vertex in row if sides[vertex] == side]
                for index, vertex in enumerate(those):
                    place_of[vertex] = (index + 0.5) / len(those) + side


def _positions(
    rows: list[list[Vertex]],
    neighbours: Mapping[Vertex, Sequence[tuple[Vertex, int]]],
    sides: Mapping[Vertex, bool],
    width: Mapping[Vertex, float],
) -> dict[Vertex, float]:
    """Return x of every vertex, each side by itself: near its neighbours, in the order of its row, nothing overlapping."""
    x: dict[Vertex, float] = {}
    lines = [[v for v in row if sides[v] == side] for row in rows for side in (False, True)]
    for line in lines:
        _pack(line, [0.0] * len(line), width, x)
    bends: dict[tuple[str, str], list[Vertex]] = defaultdict(list)
    for vertex in x:
        if not isinstance(vertex, str):
            bends[vertex[:2]].append(vertex)
    for sweep in range(3 * _SWEEPS):
        for line in lines if sweep % 2 == 0 else reversed(lines):
            wanted = []
            for vertex in line:
                others = [other for other, _ in neighbours[vertex] if sides[other] == sides[vertex]]
                if sweep >= _SWEEPS and not isinstance(vertex, str):
                    others = bends[vertex[:2]]  # straight down
                wanted.append(sum(x[other] for other in others) / (len(others) + _PULL))
            _pack(line, wanted, width, x)
    return x


def _pack(
    line: Sequence[Vertex], wanted: Sequence[float], width: Mapping[Vertex, float], x: dict[Vertex, float]
) -> None:
    """Move the vertices of a row as near to where they want to be as their widths let them: least squares, in order."""
    if not line:
        return
    widths = np.array([width[vertex] for vertex in line])
    offsets = np.concatenate([[0.0], np.cumsum((widths[1:] + widths[:-1]) / 2 + _SPACE)])
    moved = isotonic_regression(np.asarray(wanted) - offsets).x + offsets
    x.update(zip(line, moved.tolist(), strict=True))


def _separate(
    diagram: Diagram, x: dict[Vertex, float], width: Mapping[Vertex, float], sides: Mapping[Vertex, bool]
) -> tuple[float, float]:
    """Move the worker's side to the right of the client's, and return the room for labels between the two."""
    labels = [label for box in diagram.boxes.values() for label in (*box.arriving, *box.leaving)]
    room = CHARACTER * max(map(len, labels), default=0) + 2 * _LABEL_GAP
    left = max((x[v] + width[v] / 2 for v in x if not sides[v]), default=0.0)
    right = min((x[v] - width[v] / 2 for v in x if sides[v]), default=0.0)
    for vertex in x:
        if sides[vertex]:
            x[vertex] += left + room - right
    return left, left + room


def _bands(diagram: Diagram, rows: Sequence[Sequence[Vertex]]) -> list[tuple[float, float]]:
    """Return top and bottom of each row, with room for the labels of what crosses in it and above it for a frame's title."""
    bands, at, frame = [], 0.0, None
    for row in rows:
        boxes = [diagram.boxes[vertex] for vertex in row if isinstance(vertex, str)]
        labels = max((LINE * max(len(box.arriving), len(box.leaving)) for box in boxes if box.crosses), default=0.0)
        here = _frame(boxes)
        at -= 0.0 if here == frame else 2.2 * LINE
        bands.append((at, at - max([*map(_height, boxes), 2 * labels + 0.1])))
        at, frame = bands[-1][1] - _ROW_SPACE, here
    return bands


def _frame(boxes: Iterable[Box]) -> int | None:
    return next((box.frame for box in boxes), None)
