"""Place refreshes so that no value uses more levels than there are and the fewest numbers are refreshed.

A set R of values is feasible when every path whose nodes use L + 1 levels has a value of R strictly inside: after a refresh
a value has no level used. The smallest weight of R is a covering problem over all such paths, here in the extended form of
its cuts: with r_v = 1 for v in R, and f[v, k] at most the number of refreshed values strictly inside any path that ends in
v and has used k levels,

    f[w, k] ≤ f[u, k - c_w] + r_u,   f[w, c_w] ≤ 0 (a path that starts at u),   f[w, L + 1] ≥ 1.

Its linear relaxation has the same bound as one inequality for each of the exponentially many paths (shortest paths are the
separation of path covers; Vazirani, Approximation Algorithms, chapter 18 for the coupled cuts), and HiGHS, through scipy,
finds the integer optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from hecompile.errors import LegalityError

_NODE_LIMIT = 2000


@dataclass(frozen=True)
class Vertex:
    """Describe a value of the graph.

    Attributes:
        operands: indices, smaller than its own, of the values it is computed from.
        cost: levels that computing it uses.
        price: numbers that a refresh of it takes.
    """

    operands: tuple[int, ...]
    cost: int
    price: int


@dataclass(frozen=True)
class Placement:
    """Hold the indices refreshed, their price, and the proven lower bound on any placement's price."""

    refreshed: tuple[int, ...]
    price: float
    bound: float


def cheapest_refreshes(vertices: Sequence[Vertex], levels: int) -> Placement:
    """Return the cheapest feasible placement. Inputs have no operands.

    Raises LegalityError for `levels` under 1, and where the solver finds no placement.
    """
    if levels < 1:
        raise LegalityError(f"a graph with products needs at least one level between refreshes, got {levels}")
    reach = _deepest(vertices, ())
    if max(reach, default=0) <= levels:
        return Placement((), 0.0, 0.0)
    problem = _Problem(len(vertices), levels)
    for w, vertex in enumerate(vertices):
        for u in vertex.operands:
            problem.edge(u, w, vertex.cost, bool(vertices[u].operands))
    return problem.solve(vertices)


def _deepest(vertices: Sequence[Vertex], refreshed: Sequence[int]) -> list[int]:
    """Return the levels that each value has used when it is computed."""
    chosen = set(refreshed)
    used: list[int] = []
    for vertex in vertices:
        used.append(max((0 if u in chosen else used[u] for u in vertex.operands), default=0) + vertex.cost)
    return used


class _Problem:
    """Build the integer programme over r of every value, then f[v, k] for k = 1 … L + 1."""

    def __init__(self, count: int, levels: int) -> None:
        self.count, self.levels = count, levels
        self._entries: list[tuple[int, int, float]] = []
        self._rows = 0

    def _f(self, v: int, k: int) -> int:
        return self.count + v * (self.levels + 1) + k - 1

    def edge(self, u: int, w: int, cost: int, computed: bool) -> None:
        """Add the constraints of node w reading u: a path starts at u or, where u is computed, comes from before it."""
        if cost:
            self._row([(self._f(w, 1), 1.0)])  # starts at u: nothing inside
        if not computed:
            return
        for k in range(1, self.levels + 2):
            if k - cost >= 1:
                self._row([(self._f(w, k), 1.0), (self._f(u, k - cost), -1.0), (u, -1.0)])

    def _row(self, entries: list[tuple[int, float]]) -> None:
        """Add the constraint Σ entries ≤ 0."""
        self._entries += [(self._rows, column, value) for column, value in entries]
        self._rows += 1

    def solve(self, vertices: Sequence[Vertex]) -> Placement:
        size = self.count * (self.levels + 2)
        rows, columns, values = zip(*self._entries, strict=True)
        matrix = coo_matrix((values, (rows, columns)), shape=(self._rows, size)).tocsr()
        prices = np.zeros(size)
        prices[: self.count] = [vertex.price for vertex in vertices]
        lower, upper = np.zeros(size), np.ones(size)
        for v, vertex in enumerate(vertices):
            if not vertex.operands:
                upper[v] = 0.0  # an input is fresh
            lower[self._f(v, self.levels + 1)] = 1.0
        integrality = np.zeros(size)
        integrality[: self.count] = 1
        solution = milp(
            prices,
            constraints=LinearConstraint(matrix, -np.inf, 0.0),
            bounds=Bounds(lower, upper),
            integrality=integrality,
            options={"node_limit": _NODE_LIMIT},
        )
        if solution.x is None:
            raise LegalityError(f"no placement of refreshes was found for {self.levels} levels: {solution.message}")
        refreshed = tuple(int(v) for v in np.flatnonzero(solution.x[: self.count] > 0.5))
        assert max(_deepest(vertices, refreshed)) <= self.levels
        price = float(sum(vertices[v].price for v in refreshed))
        return Placement(refreshed, price, float(solution.mip_dual_bound))
