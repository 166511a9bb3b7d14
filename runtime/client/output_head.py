"""Take the output head off a client's plan: what it multiplies by, and what becomes of the products."""

from __future__ import annotations

import onnx_ir as ir

from hecompile.errors import LegalityError
from hecompile.graph.ir import DOMAIN, constant_of
from hecompile.runtime.model.head import LogitsForm


def detach_head(model: ir.Model) -> tuple[str, LogitsForm]:
    """Make the head's input the graph's only output; return the name of the head's weight, and the form of its logits.

    Raises LegalityError when the logits are anything but a Linear of a frozen weight, times numbers and capped at most once.
    """
    (logits,) = model.graph.outputs
    node, factor, cap = logits.producer(), 1.0, None
    while node is not None and (node.domain, node.op_type) != (DOMAIN, "Linear"):
        if node.op_type == "Tanh" and cap is None:
            factor, cap = 1.0, factor
            node = _maker(node.inputs[0])
            continue
        value, number = _times(node)
        if value is None:
            break
        factor, node = factor * number, _maker(value)
    if node is None or (node.domain, node.op_type) != (DOMAIN, "Linear"):
        raise LegalityError(f"the output {logits.name} of the client plan is not made by a Linear; export it again")
    hidden, weight = node.inputs
    assert hidden is not None and weight is not None and weight.is_initializer()
    name = str(weight.name)
    model.graph.outputs[0] = hidden
    _remove(model, logits.producer(), hidden)
    return name, LogitsForm(factor, cap)


def _times(node: ir.Node) -> tuple[ir.Value | None, float]:
    """Return x and c where `node` computes c·x; no value where it computes something else."""
    if node.domain or node.op_type not in ("Mul", "Div"):
        return None, 1.0
    first, second = node.inputs
    for value, constant in ((first, second), (second, first)):
        number = constant_of(constant)
        if number is not None and number.size == 1 and constant_of(value) is None:
            if node.op_type == "Mul":
                return value, float(number)
            if constant is second:
                return value, 1.0 / float(number)
    return None, 1.0


def _maker(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _remove(model: ir.Model, node: ir.Node | None, until: ir.Value) -> None:
    """Remove the nodes from the logits back to `until`; the head's weight stays, for the client multiplies by it."""
    while node is not None:
        before = [value for value in node.inputs if value is not None and value is not until and value.producer()]
        model.graph.remove(node, safe=True)
        node = next((value.producer() for value in before if not value.uses() and constant_of(value) is None), None)
