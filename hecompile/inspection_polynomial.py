"""What `hecompile inspect` shows of a polynomial graph: what was approximated where, depth, modulus bits, refreshes."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from rich.table import Table

from hecompile.approximation_ranges import NORMS
from hecompile.depth import demand, levels
from hecompile.errors import InputError
from hecompile.ir import ATTENTION_OPERATORS, DOMAIN, attributes_of, module_path
from hecompile.legality import REFRESHED, check_stage

BITS_PER_LEVEL = 40


def polynomial_file_table(path: Path) -> Table:
    """`depth_table` of a saved graph. Raises InputError when the file is no ONNX model, or not at stage `polynomial`."""
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise many kinds for a file that is no model
        raise InputError(f"{path} cannot be read as an ONNX model; give a build directory or a polynomial graph") from error
    check_stage(model, REFRESHED)
    return depth_table(model)


def approximation_table(model: ir.Model) -> Table | None:
    """A row per approximated node with its domain, degree or iterations and error bound; None where there is none."""
    table = Table(title="approximations")
    for heading in ("module", "operator", "domain", "degree, steps", "error bound"):
        table.add_column(heading, overflow="fold")
    for node in model.graph:
        if node.domain != DOMAIN or "error_bound" not in node.attributes:
            continue
        given = attributes_of(node)
        bound = f"{given['error_bound']:.2e}"
        table.add_row(module_path(node), node.op_type, _domain(node.op_type, given), _effort(node.op_type, given), bound)
    return table if table.row_count else None


def _domain(op_type: str, given: dict[str, object]) -> str:
    if op_type == "PowerAttention":
        if given["division"] == "exact":
            return f"|score| ≤ {given['domain_upper']:.4g}"
        return f"divisor {given['ratio_lower']:.3g} … {given['ratio_upper']:.3g}"
    what = "exponent" if op_type in ATTENTION_OPERATORS else "variance" if op_type in NORMS else "x"
    return f"{what} {given['domain_lower']:.3g} … {given['domain_upper']:.3g}"


def _effort(op_type: str, given: dict[str, object]) -> str:
    parts = []
    coefficients = given.get("coefficients")
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
        if given.get(name):
            parts.append(f"{given[name]} {text}")
    return ", ".join(parts) or "exact"


def depth_table(model: ir.Model, bits_per_level: int = BITS_PER_LEVEL) -> Table:
    """Depth, modulus bits, products and refreshes of a graph at stage `polynomial`, and its depth module by module."""
    found = demand(model)
    table = Table(title="polynomial graph, per sequence", show_header=False)
    rows = (
        ("levels" + (" between refreshes" if found.refreshes else ""), found.depth),
        (f"modulus bits at {bits_per_level} per level", found.modulus_bits(bits_per_level)),
        ("products of ciphertexts", found.ciphertext_products),
        ("products by constants", found.plaintext_products),
        ("numbers refreshed", found.refreshes),
    )
    for name, value in rows:
        table.add_row(name, str(value))
    table.add_section()
    for module, (level, refreshed) in _modules(model).items():
        table.add_row(module, f"level {level}" + (f", refreshed at {refreshed}" if refreshed else ""))
    return table


def _modules(model: ir.Model) -> dict[str, tuple[int, str]]:
    """Module → (deepest level used there, names of the values refreshed there), in the order of the graph."""
    used = levels(model)
    found: dict[str, tuple[int, str]] = {}
    for node in model.graph:
        if node.outputs[0] not in used:
            continue
        module = module_path(node) or "the graph"
        level, names = found.get(module, (0, ""))
        if node.op_type == "Refresh" and node.inputs[0] is not None:
            names = f"{names}, {node.inputs[0].name}" if names else str(node.inputs[0].name)
        found[module] = (max(level, used[node.outputs[0]]), names)
    return found
