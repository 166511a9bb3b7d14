"""Draw a placed diagram into an SVG or PNG file by matplotlib."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from hecompile.errors import InputError
from hecompile.files import reason_of
from hecompile.inspection.picture.folding import Box, Diagram
from hecompile.inspection.picture.layout import LINE, Layout, Rectangle, place

CLIENT_COLOUR, WORKER_COLOUR = "#9ecae1", "#fdae6b"
_CLIENT_GROUND, _WORKER_GROUND = "#f3f8fc", "#fef5ec"
_INK, _EDGE, _CROSSING, _FRAME = "#222222", "#7f7f7f", "#b22222", "#555555"
Point = tuple[float, float]
_SUFFIXES = (".svg", ".png")
_MARGIN, _HEAD, _INSET = 0.3, 1.25, 0.22
_FONT = 8
_PORT = 0.08
"""How far above and below the middle of a box's side edges cross."""
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
_DOTS_PER_INCH = 110


def check_picture(path: Path) -> None:
    """Raise InputError for a file type that is not drawn."""
    if path.suffix not in _SUFFIXES:
        raise InputError(f"cannot draw into {path}: give a file that ends in {' or '.join(_SUFFIXES)}")


def draw(diagram: Diagram, title: str, note: str, path: Path) -> None:
    """Draw a diagram with a title and a legend; `note` says what its bytes count.

    Raises InputError for another file type or a place that cannot be written.
    """
    check_picture(path)
    import matplotlib
    from matplotlib.figure import Figure

    layout = place(diagram)
    left, right, bottom, top = layout.bounds
    left, right, bottom, top = (
        left - _MARGIN - _INSET,
        right + _MARGIN + _INSET,
        bottom - _MARGIN,
        top + _MARGIN + _HEAD,
    )
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hecompile", "font.size": _FONT}):
        figure = Figure(figsize=(right - left, top - bottom), dpi=_DOTS_PER_INCH)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(bottom, top))
        axes.set_axis_off()
        _grounds(axes, layout, (left, right, bottom, top), title, note)
        _frames(axes, diagram, layout)
        for source, target in diagram.edges:
            _edge(axes, diagram, layout, source, target)
        for name, box in diagram.boxes.items():
            _box(axes, box, layout.boxes[name])
            _labels(axes, box, layout.boxes[name], layout.gap)
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise InputError(f"cannot write {path}: {reason_of(error)}") from error


def _grounds(axes: Any, layout: Layout, extent: tuple[float, float, float, float], title: str, note: str) -> None:
    """Draw the two sides, the title and the legend."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.patches import Rectangle as Patch

    left, right, bottom, top = extent
    middle, head = (layout.gap[0] + layout.gap[1]) / 2, top - _HEAD + 0.05
    for start, end, colour, name in (
        (left, middle, _CLIENT_GROUND, "client"),
        (middle, right, _WORKER_GROUND, "worker: sees ciphertexts only"),
    ):
        axes.add_patch(Patch((start, bottom), end - start, head - bottom, facecolor=colour, edgecolor="none", zorder=0))
        axes.text((start + end) / 2, head - 0.12, name, ha="center", va="center", fontsize=_FONT + 2, zorder=5)
    axes.text(left + _MARGIN, top - 0.25, title, va="center", fontsize=_FONT + 2, weight="bold")
    y, x = top - 0.55, left + _MARGIN
    for colour, name, room in (
        (CLIENT_COLOUR, "computed by the client", 1.95),
        (WORKER_COLOUR, "computed by the worker", 0),
    ):
        axes.add_patch(Patch((x, y - 0.07), 0.24, 0.14, facecolor=colour, edgecolor=_FRAME, linewidth=0.6))
        axes.text(x + 0.32, y, name, va="center")
        x += room
    x = left + _MARGIN
    for y, colour, name in (
        (top - 0.8, _EDGE, "stays on its side"),
        (top - 1.02, _CROSSING, f"crosses, encrypted; {note}"),
    ):
        arrow = FancyArrowPatch((x, y), (x + 0.26, y), arrowstyle="-|>", mutation_scale=8, color=colour, linewidth=1.0)
        axes.add_patch(arrow)
        axes.text(x + 0.32, y, name, va="center")


def _frames(axes: Any, diagram: Diagram, layout: Layout) -> None:
    from matplotlib.patches import FancyBboxPatch

    left, right = layout.bounds[0] - _INSET, layout.bounds[1] + _INSET
    for number, title in enumerate(diagram.frames):
        inside = [layout.boxes[name] for name, box in diagram.boxes.items() if box.frame == number]
        top, bottom = max(one.top for one in inside) + 2 * LINE, min(one.bottom for one in inside) - 0.12
        axes.add_patch(
            FancyBboxPatch(
                (left, bottom), right - left, top - bottom, boxstyle="round,pad=0,rounding_size=0.1", facecolor="none",
                edgecolor=_FRAME, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1,
            )
        )  # fmt: skip
        axes.text(right - 0.1, top - LINE, title, ha="right", va="center", style="italic", fontsize=_FONT + 1, zorder=5)


def _box(axes: Any, box: Box, where: Rectangle) -> None:
    from matplotlib.patches import FancyBboxPatch

    colour = WORKER_COLOUR if box.worker else CLIENT_COLOUR
    axes.add_patch(
        FancyBboxPatch(
            (where.left, where.bottom), where.width, where.height, boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=colour, edgecolor=_FRAME, linewidth=0.7, zorder=3,
        )
    )  # fmt: skip
    lines = (box.title, *box.lines)
    for index, line in enumerate(lines):
        y = where.y + LINE * ((len(lines) - 1) / 2 - index)
        weight = "bold" if index == 0 else "normal"
        axes.text(where.x, y, line, ha="center", va="center", weight=weight, color=_INK, zorder=4)


def _labels(axes: Any, box: Box, where: Rectangle, gap: tuple[float, float]) -> None:
    """Write what crosses at a box into the gap: what arrives above the middle, what leaves below it."""
    middle = sum(gap) / 2
    for labels, sign in ((box.arriving, 1), (box.leaving, -1)):
        for index, label in enumerate(labels):
            offset = 0.1 + LINE * (len(labels) - 1 - index if sign > 0 else index) + LINE / 2
            y = where.y + sign * offset
            axes.text(middle, y, label, ha="center", va="center", color=_CROSSING, zorder=6, bbox=_PAPER)


def _edge(axes: Any, diagram: Diagram, layout: Layout, source: str, target: str) -> None:
    """Draw an edge through its bends, with a tip in the way that it arrives."""
    from matplotlib.patches import FancyArrowPatch, PathPatch
    from matplotlib.path import Path as Curve

    crosses = diagram.boxes[source].worker != diagram.boxes[target].worker
    colour, width = (_CROSSING, 1.3) if crosses else (_EDGE, 0.9)
    vertices = _course(diagram, layout, source, target)
    curve = Curve(vertices, [Curve.MOVETO, *([Curve.CURVE4] * (len(vertices) - 1))])
    axes.add_patch(PathPatch(curve, facecolor="none", edgecolor=colour, linewidth=width, zorder=2))
    (x, y), end = vertices[-1], layout.boxes[target]
    from_side = -0.05 if x == end.left else 0.05
    start = (x, y + 0.05) if y == end.top else (x + from_side, y)
    tip = FancyArrowPatch(
        start, (x, y), arrowstyle="-|>", mutation_scale=9, color=colour, linewidth=width, shrinkA=0, shrinkB=0, zorder=4
    )
    axes.add_patch(tip)


def _course(diagram: Diagram, layout: Layout, source: str, target: str) -> list[Point]:
    """Return the control points of an edge: cubic curves from point to point, downwards.

    It leaves, or arrives at, the side of the box that has its bytes beside it.
    """
    start, end = layout.boxes[source], layout.boxes[target]
    to_worker = diagram.boxes[target].worker
    crosses = diagram.boxes[source].worker != to_worker
    arrives = crosses and diagram.boxes[target].crosses
    leaves = crosses and diagram.boxes[source].crosses and not arrives
    first = (start.right if to_worker else start.left, start.y - _PORT) if leaves else (start.x, start.bottom)
    last = (end.left if to_worker else end.right, end.y + _PORT) if arrives else (end.x, end.top)
    between = layout.courses[source, target]
    points = [first, *between[leaves : len(between) - arrives], last]
    vertices = [first]
    for index, ((x0, y0), (x1, y1)) in enumerate(itertools.pairwise(points)):
        half = (y0 + y1) / 2
        if arrives and index == len(points) - 2:
            vertices += [(x0, y1), (x0, y1), (x1, y1)]
        elif leaves and index == 0:
            vertices += [(x1, y0), (x1, y0), (x1, y1)]
        else:
            vertices += [(x0, half), (x1, half), (x1, y1)]
    return vertices
