"""Show a polynomial graph: what was approximated where, depth, modulus bits, refreshes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from rich.table import Table
from rich.text import Text

from hecompile.ckks.parameters import MAX_MODULUS_BITS, MAX_SCALE_BITS, CkksLiteral, smallest
from hecompile.errors import InputError
from hecompile.graph.ir import ATTENTION_OPERATORS, DOMAIN, attributes_of, module_path
from hecompile.graph.legality import REFRESHED, check_stage
from hecompile.he.security import COST_MODEL, MINIMUM_BITS
from hecompile.inspection.kinds import kind_of, span
from hecompile.inspection.rows import named_rows
from hecompile.polynomial.depth import CircuitCost, circuit_cost, elements, levels, product_kind
from hecompile.polynomial.inputs import NORMS

_RING = f"ring dimension at {MINIMUM_BITS:.0f} bits ({COST_MODEL})"


def polynomial_file(path: Path) -> ir.Model:
    """Read a saved graph.

    Raises InputError when the file is no ONNX model or an empty one, LegalityError when it is not at stage `polynomial`,
    with refreshes or without.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise many kinds for a file that is no model
        raise InputError(
            f"{path} cannot be read as an ONNX model; give a build directory or a polynomial graph"
        ) from error
    if not len(model.graph):  # protobuf takes an empty file, too
        raise InputError(f"{path} holds no graph; give a build directory or a polynomial graph")
    check_stage(model, REFRESHED)
    return model


def approximation_table(model: ir.Model, layers: bool = False) -> Text | None:
    """Return a row per kind of approximated node: its domain, degree or iterations, error bound. None where there is none.

    Ranges are over the layers: a domain is the widest. layers: a row per node instead.
    """
    rows: dict[tuple[str, str, str, tuple[str, ...]], list[_Approximation]] = {}
    for node in model.graph:
        if node.domain == DOMAIN and "error_bound" in node.attributes:
            found = _Approximation.of(node.op_type, attributes_of(node))
            module = module_path(node) if layers else kind_of(module_path(node))
            rows.setdefault((module, node.op_type, found.what, tuple(text for text, _ in found.effort)), []).append(
                found
            )
    if not rows:
        return None
    groups = [
        (f"{module}{f' × {len(those)}' if len(those) > 1 else ''}: {op_type}", [_approximation_row(what, texts, those)])
        for (module, op_type, what, texts), those in rows.items()
    ]
    title = "approximations" + ("" if layers else ", ranges over layers")
    return named_rows(title, ("domain", "degree, steps", "error bound"), groups, left=2)


def _approximation_row(what: str, texts: tuple[str, ...], those: list[_Approximation]) -> list[str]:
    efforts = zip(texts, zip(*([number for _, number in one.effort] for one in those), strict=True), strict=True)
    effort = ", ".join(text.format(span(values)) for text, values in efforts) or "exact"
    return [_domain(what, those), effort, span((one.error_bound for one in those), "{:.2e}".format)]


@dataclass(frozen=True)
class _Approximation:
    """Hold what an approximated node does: where it holds, the steps it takes, each a text and its number, and its error."""

    what: str
    lower: float | None
    upper: float
    effort: tuple[tuple[str, float], ...]
    error_bound: float

    @classmethod
    def of(cls, op_type: str, attributes: dict[str, Any]) -> _Approximation:
        lower: float | None
        if op_type == "PowerAttention" and attributes["division"] == "exact":
            what, lower, upper = "|score|", None, attributes["domain_upper"]
        elif op_type == "PowerAttention":
            what, lower, upper = "divisor", attributes["ratio_lower"], attributes["ratio_upper"]
        else:
            what = "exponent" if op_type in ATTENTION_OPERATORS else "variance" if op_type in NORMS else "x"
            lower, upper = attributes["domain_lower"], attributes["domain_upper"]
        return cls(what, lower, upper, tuple(_effort(op_type, attributes)), attributes["error_bound"])


def _domain(what: str, those: list[_Approximation]) -> str:
    upper = max(one.upper for one in those)
    lowers = [one.lower for one in those if one.lower is not None]
    return f"{what} {min(lowers):.3g} … {upper:.3g}" if lowers else f"{what} ≤ {upper:.4g}"


def _effort(op_type: str, attributes: dict[str, Any]) -> Iterator[tuple[str, float]]:
    coefficients = attributes.get("coefficients")
    if isinstance(coefficients, (list, tuple)):
        composed = op_type == "ComposedSiLU"
        yield ("{} of degree 7", len(coefficients) // 4) if composed else ("degree {}", len(coefficients) - 1)
    for name, text in (
        ("bits", "bits"),
        ("newton_steps", "Newton"),
        ("squarings", "squarings"),
        ("iterations", "Goldschmidt"),
        ("halvings", "normalisations"),
        ("square_iterations", "Goldschmidt each"),
    ):
        if attributes.get(name):
            yield f"{{}} {text}", attributes[name]


def depth_table(model: ir.Model, literal: CkksLiteral | None = None, layers: bool = False) -> Table:
    """Return depth, modulus bits, products and refreshes of a graph at stage `polynomial`, and its depth by module.

    A module that stands in several layers has one row, with ranges, unless `layers` asks for all of them.

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
    table.add_column("what", overflow="fold", no_wrap=True)
    table.add_column("value", overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    table.add_section()
    for module, value in _module_rows(modules_of(model), layers):
        table.add_row(module, value)
    return table


@dataclass(frozen=True)
class ModuleDepth:
    """Hold the deepest level of a module and the names of the values that are refreshed in it."""

    level: int
    refreshed: tuple[str, ...] = ()


def _module_rows(modules: dict[str, ModuleDepth], layers: bool) -> Iterator[tuple[str, str]]:
    kinds: dict[str, list[str]] = {}
    for module in modules:
        kinds.setdefault(module if layers else kind_of(module), []).append(module)
    for kind, names in kinds.items():
        those = [modules[name] for name in names]
        level = f"level {span(one.level for one in those)}"
        if len(those) == 1:
            refreshed = ", ".join(those[0].refreshed)
            yield names[0], level + (f", refreshed at {refreshed}" if refreshed else "")
            continue
        counts = span(len(one.refreshed) for one in those)
        yield f"{kind} × {len(those)}", level + (f", refreshed at {counts} values each" if counts != "0" else "")


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


def modules_of(model: ir.Model) -> dict[str, ModuleDepth]:
    """Return the modules of a graph at stage `polynomial`, by their paths, in the order of the graph."""
    modules: dict[str, ModuleDepth] = {}
    for node, level in _counted(model):
        module = module_path(node) or "the graph"
        known = modules.get(module, ModuleDepth(0))
        first = node.inputs[0]
        here = (str(first.name),) if node.op_type == "Refresh" and first is not None else ()
        modules[module] = ModuleDepth(max(known.level, level), known.refreshed + here)
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


def graph_json(model: ir.Model) -> dict[str, Any]:
    """Return depth, products, refreshes and modules as JSON values. docs/command-line.md lists the keys."""
    cost = circuit_cost(model)
    modules = [
        {"module": module, "level": found.level, "refreshed": list(found.refreshed)}
        for module, found in modules_of(model).items()
    ]
    return {
        "levels": cost.depth,
        "ciphertext_products": cost.ciphertext_products,
        "plaintext_products": cost.plaintext_products,
        "numbers_refreshed": cost.refreshes,
        "modules": modules,
    }
