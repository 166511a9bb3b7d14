"""Show a polynomial graph: what was approximated where, depth, modulus bits, refreshes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
from rich.table import Table

from hecompile.ckks.parameters import MAX_MODULUS_BITS, MAX_SCALE_BITS, CkksLiteral, smallest
from hecompile.errors import InputError
from hecompile.graph.ir import ATTENTION_OPERATORS, DOMAIN, attributes_of, module_path
from hecompile.graph.legality import REFRESHED, check_stage
from hecompile.he.security import COST_MODEL, MINIMUM_BITS
from hecompile.polynomial.depth import CircuitCost, circuit_cost, elements, levels, product_kind
from hecompile.polynomial.inputs import NORMS

_RING = f"ring dimension at {MINIMUM_BITS:.0f} bits ({COST_MODEL})"


def polynomial_file(path: Path) -> ir.Model:
    """Read a saved graph.

    Raises InputError when the file is no ONNX model, LegalityError when it is not at stage `polynomial`, with refreshes or
    without.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise many kinds for a file that is no model
        raise InputError(f"{path} cannot be read as an ONNX model; give a build directory or a polynomial graph") from error
    check_stage(model, REFRESHED)
    return model


def approximation_table(model: ir.Model) -> Table | None:
    """Return a row per approximated node with its domain, degree or iterations and error bound; None where there is none."""
    table = Table(title="approximations")
    for heading in ("module", "operator", "domain", "degree, steps", "error bound"):
        table.add_column(heading, overflow="fold")
    for node in model.graph:
        if node.domain != DOMAIN or "error_bound" not in node.attributes:
            continue
        attributes = attributes_of(node)
        domain, effort = _domain(node.op_type, attributes), _effort(node.op_type, attributes)
        table.add_row(module_path(node), node.op_type, domain, effort, f"{attributes['error_bound']:.2e}")
    return table if table.row_count else None


def _domain(op_type: str, attributes: dict[str, object]) -> str:
    if op_type == "PowerAttention":
        if attributes["division"] == "exact":
            return f"|score| ≤ {attributes['domain_upper']:.4g}"
        return f"divisor {attributes['ratio_lower']:.3g} … {attributes['ratio_upper']:.3g}"
    what = "exponent" if op_type in ATTENTION_OPERATORS else "variance" if op_type in NORMS else "x"
    return f"{what} {attributes['domain_lower']:.3g} … {attributes['domain_upper']:.3g}"


def _effort(op_type: str, attributes: dict[str, object]) -> str:
    parts = []
    coefficients = attributes.get("coefficients")
    if isinstance(coefficients, (list, tuple)):
        composed = op_type == "ComposedSiLU"
        parts.append(f"{len(coefficients) // 4} of degree 7" if composed else f"degree {len(coefficients) - 1}")
    for name, text in (
        ("bits", "bits"),
        ("newton_steps", "Newton"),
        ("squarings", "squarings"),
        ("iterations", "Goldschmidt"),
        ("halvings", "normalisations"),
        ("square_iterations", "Goldschmidt each"),
    ):
        if attributes.get(name):
            parts.append(f"{attributes[name]} {text}")
    return ", ".join(parts) or "exact"


def depth_table(model: ir.Model, literal: CkksLiteral | None = None) -> Table:
    """Return depth, modulus bits, products and refreshes of a graph at stage `polynomial`, and its depth by module.

    literal: the CKKS parameters that it was compiled for; None: the smallest that have its levels, where there are any.
    """
    cost = circuit_cost(model)
    literal = literal or smallest(max(cost.depth, 1))
    table = Table(title="polynomial graph, per sequence", show_header=False)
    rows = (
        ("levels" + (" between refreshes" if cost.refreshes else ""), str(cost.depth)),
        *_modulus_rows(cost, literal),
        ("products of ciphertexts", str(cost.ciphertext_products)),
        ("products by constants", str(cost.plaintext_products)),
        ("numbers refreshed", str(cost.refreshes)),
    )
    for name, value in rows:
        table.add_row(name, value)
    table.add_section()
    for module, (level, refreshed) in _modules(model).items():
        table.add_row(module, f"level {level}" + (f", refreshed at {refreshed}" if refreshed else ""))
    return table


def _modulus_rows(cost: CircuitCost, literal: CkksLiteral | None) -> tuple[tuple[str, str], ...]:
    if literal is None:
        bits = cost.modulus_bits()
        none = f"none: at most {max(MAX_MODULUS_BITS.values())} bits are allowed; place refreshes"
        return ((f"modulus bits at {MAX_SCALE_BITS} per level", str(bits)), (_RING, none))
    allowed = MAX_MODULUS_BITS[literal.ring_dim]
    return (
        (f"modulus bits at {literal.scale_bits} per level", f"{literal.modulus_bits} of {allowed} allowed"),
        (_RING, str(literal.ring_dim)),
    )


def _modules(model: ir.Model) -> dict[str, tuple[int, str]]:
    """Map each module to its deepest level and the names of the values refreshed there, in the order of the graph."""
    modules: dict[str, tuple[int, str]] = {}
    for node, level in _counted(model):
        module = module_path(node) or "the graph"
        deepest, names = modules.get(module, (0, ""))
        if node.op_type == "Refresh" and node.inputs[0] is not None:
            names = f"{names}, {node.inputs[0].name}" if names else str(node.inputs[0].name)
        modules[module] = (max(deepest, level), names)
    return modules


def node_table(model: ir.Model) -> Table:
    """Return a row per node that works on ciphertexts, in the order of the graph.

    It has the level of the node's result, how many numbers that is per sequence, and the kind of product it takes; a refresh
    has the level that it ends.
    """
    table = Table(title="nodes")
    for heading in ("value", "operator", "module", "level", "numbers", "product by"):
        table.add_column(heading, justify="right" if heading in ("level", "numbers") else "left", overflow="fold")
    used = levels(model)
    for node, level in _counted(model):
        shown, (first, *_) = str(level), node.inputs
        if node.op_type == "Refresh" and first is not None:
            shown = f"{used[first]} → 0"
        output = node.outputs[0]
        kind = product_kind(node) or ""
        numbers = sum(elements(value) for value in node.outputs)
        table.add_row(str(output.name), node.op_type, module_path(node), shown, str(numbers), kind)
    return table


def _counted(model: ir.Model) -> Iterator[tuple[ir.Node, int]]:
    """Iterate over the nodes that depend on an input, with the level of their results."""
    used = levels(model)
    return ((node, used[node.outputs[0]]) for node in model.graph if node.outputs[0] in used)
