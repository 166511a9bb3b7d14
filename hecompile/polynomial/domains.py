"""Find the polynomials of a run whose inputs left their domains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
from torch import Tensor

from hecompile.graph.ir import module_path
from hecompile.polynomial.inputs import ACTIVATIONS, NORMS, AttentionInputs, NonlinearNodes, is_approximated
from hecompile.polynomial.ranges import Interval, domain_checks, range_of


@dataclass(frozen=True)
class DomainViolation:
    """Describe values that left the domain of a polynomial.

    Attributes:
        where: path of the module that the polynomial belongs to.
        part: what it replaces: "attention", "norm" or "activation".
        what: which of its inputs, e.g. "the variance".
        seen: the range of that input.
        domain: where the polynomial is defined.
    """

    where: str
    part: str
    what: str
    seen: Interval
    domain: Interval

    def __str__(self) -> str:
        return (
            f"{self.where}: {self.what} between {self.seen.lower:.5g} and {self.seen.upper:.5g}, domain "
            f"[{self.domain.lower:.5g}, {self.domain.upper:.5g}]"
        )


class DomainMonitor:
    """Collect the domain violations of one run. Give `observe` to the interpreter, then read `violations`.

    The first node with an infinite or NaN input is the last one checked: what follows is its consequence. Tables are not
    checked, for they are as bounded outside of their domain as in it.

    lengths: of packed sequences, as in `NonlinearNodes.record`.
    """

    def __init__(self, model: ir.Model, lengths: Sequence[int] | None = None) -> None:
        nodes = NonlinearNodes(model, lambda node: is_approximated(node) and node.op_type != "QuantizedSiLU")
        self.observe = nodes.record(self._check, lengths=lengths).observe
        self._violations: dict[tuple[ir.Value, str], DomainViolation] = {}
        self._not_finite: ir.Node | None = None

    @property
    def violations(self) -> tuple[DomainViolation, ...]:
        """Return the violations so far, in the order of the graph; one per node and kind of input."""
        return tuple(self._violations.values())

    def _check(self, node: ir.Node, inputs: AttentionInputs | Tensor) -> None:
        if self._not_finite not in (None, node):
            return
        for check in domain_checks(node, range_of(inputs)):
            if not (math.isfinite(check.seen.lower) and math.isfinite(check.seen.upper)):
                self._not_finite = node
            if check.passed:
                continue
            key = (node.outputs[0], check.what)
            if (known := self._violations.get(key)) is not None:  # by another packed sequence
                self._violations[key] = replace(known, seen=known.seen.joined(check.seen))
                continue
            part = "norm" if node.op_type in NORMS else "activation" if node.op_type in ACTIVATIONS else "attention"
            where = module_path(node) or str(node.outputs[0].name)
            self._violations[key] = DomainViolation(where, part, check.what, check.seen, check.domain)
