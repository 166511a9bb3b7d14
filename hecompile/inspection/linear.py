"""Show a compiled plan: a row per linear, totals, and a picture in two colours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import onnx_ir as ir
from rich.table import Table

from hecompile.bundles.client import CircuitRecord, ClientBundle, PlanRecord
from hecompile.errors import InputError
from hecompile.files import reason_of
from hecompile.graph.ir import DOMAIN, module_path
from hecompile.he.check_vectors import tolerance
from hecompile.he.parameters import LinearParameters, RingParameters
from hecompile.he.security import COST_MODEL, show_bits
from hecompile.inspection.prediction import megabytes, stored_hint_bytes
from hecompile.plan.costs import hint_bytes

_CLIENT_COLOUR, _WORKER_COLOUR = "#9ecae1", "#fdae6b"
_SUFFIXES = (".svg", ".png")


@dataclass(frozen=True)
class Traffic:
    """Hold predicted payload bytes per token of one forward and one backward pass, without frame headers."""

    bytes_up: int
    bytes_down: int

    @property
    def total(self) -> int:
        return self.bytes_up + self.bytes_down


def predicted_traffic(circuits: dict[str, LinearParameters], skipped: frozenset[str] = frozenset()) -> Traffic:
    """Sum the traffic of the circuits that are not in `skipped`."""
    used = [parameters for name, parameters in circuits.items() if name not in skipped]
    return Traffic(sum(p.bytes_up(1) for p in used), sum(p.bytes_down(1) for p in used))


def hint_traffic(
    circuits: dict[str, LinearParameters], ring: RingParameters, skipped: frozenset[str] = frozenset()
) -> int:
    """Return the bytes that a client without hints downloads besides, per step: each circuit's hint, once."""
    return sum(hint_bytes(ring, p.out_features) for name, p in circuits.items() if name not in skipped)


def circuits_without_gradient(model: ir.Model) -> frozenset[str]:
    """Name the backward circuits that training never calls.

    No LoRA matrix stands before such a linear, so that its input needs no gradient: in a Llama, those that read the
    normalised embedding.
    """
    trained: set[ir.Value] = {value for value in model.graph.inputs if ".lora_" in str(value.name)}
    unused: list[str] = []
    for node in model.graph:
        reached = any(value in trained for value in node.inputs if value is not None)
        if reached:
            trained.update(node.outputs)
        elif node.domain == DOMAIN and node.op_type == "RemoteLinear":
            unused.append(f"{module_path(node)}.backward")
    return frozenset(unused)


def circuit_table(bundle: ClientBundle) -> Table:
    """Return a row per circuit: shape, ring, bytes, security, precision, predicted noise."""
    ring = bundle.ring
    table = Table(title=f"plan {bundle.plan_id[:16]} of {bundle.plan.base_model}")
    for heading in (
        "linear",
        "direction",
        "in x out",
        "ring x rank",
        "limbs up",
        "bytes down",
        f"security ({COST_MODEL})",
        "effective",
    ):
        table.add_column(heading, justify="left" if heading in ("linear", "direction") else "right", overflow="fold")
    for heading in ("noise std", "unseen error / noise std", "input bound", "bytes/token up", "down"):
        table.add_column(heading, justify="right", overflow="fold")
    for name, record in bundle.plan.circuits.items():
        table.add_row(*_row(record, bundle.circuits[name], f"{ring.ring_dim} x {ring.rank}", ring.security_bits))
    return table


def _row(record: CircuitRecord, parameters: LinearParameters, ring: str, security: float) -> tuple[str, ...]:
    return (
        record.linear,
        record.direction,
        f"{record.in_features} x {record.out_features}",
        ring,
        str(record.upload_limbs),
        str(record.reply_bytes),
        f"{security:.0f} bits",
        f"{record.effective_bits:.1f} bits",
        f"{record.noise_std:.4g}",
        f"{tolerance(parameters) / record.noise_std:.0f}",
        str(parameters.input_bound),
        str(parameters.bytes_up(1)),
        str(parameters.bytes_down(1)),
    )


def totals_table(bundle: ClientBundle) -> Table:
    """Return the totals of the plan."""
    skipped = circuits_without_gradient(bundle.graph())
    training = predicted_traffic(bundle.circuits, skipped)
    forward = predicted_traffic({n: p for n, p in bundle.circuits.items() if n.endswith(".forward")})
    stored = stored_hint_bytes(bundle.ring, (p.out_features for p in bundle.circuits.values()))
    weights = sum(p.in_features * p.out_features for n, p in bundle.circuits.items() if n.endswith(".forward"))
    table = Table(title="totals", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    lora = bundle.plan.lora
    rows = {
        "security": f"{show_bits(bundle.ring.security_bits)}: {'ring' if bundle.ring.packed else 'module'} LWE, dimension "
        f"{bundle.ring.lattice_dim}, q = 2^32",
        "precision": reached_precision(bundle.plan),
        "bytes per token, training step": f"{training.bytes_up} up, {training.bytes_down} down",
        "bytes per token, inference": f"{forward.bytes_up} up, {forward.bytes_down} down",
        "remote weights": f"{weights} of {bundle.plan.weight_bits} bits",
        "hints on the client": megabytes(stored) if bundle.plan.hints == "stored" else _fetched(bundle, skipped),
        "LoRA": f"r = {lora.r}, alpha = {lora.lora_alpha:g}, {', '.join(lora.target_modules)}",
        "batch": f"up to {bundle.plan.batch_size} x {bundle.plan.sequence_buckets} tokens",
    }
    for what, value in rows.items():
        table.add_row(what, value)
    return table


def reached_precision(plan: PlanRecord) -> str:
    """Say which precision the products have, and which was asked for: they can have more at no price.

    A precision between the two gives the same plan, for the choice is the cheapest of those that reach it.
    """
    low, high = plan.reached_bits()
    shown = f"{low:.1f} to {high:.1f} effective bits, {plan.effective_bits:g} asked for"
    least = math.floor(10 * low) / 10
    return f"{shown}; up to {least:g} the plan is the same" if least >= plan.effective_bits + 0.5 else shown


def _fetched(bundle: ClientBundle, skipped: frozenset[str]) -> str:
    """Say what fetching the hints adds to the download of a training step."""
    step = hint_traffic(bundle.circuits, bundle.ring, skipped)
    tokens = bundle.plan.batch_size * bundle.plan.sequence_buckets[-1]
    return f"none: {step} bytes more down per step, {step / tokens:.0f} per token at {tokens} tokens"


def draw(bundle: ClientBundle, path: Path) -> None:
    """Draw the plan, one box per operator, client and worker in two colours, into an SVG or PNG file.

    Raises InputError for another file type or a place that cannot be written.
    """
    if path.suffix not in _SUFFIXES:
        raise InputError(f"cannot draw into {path}: give a file that ends in {' or '.join(_SUFFIXES)}")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    graph = plan_graph(bundle.graph())
    position = _positions(graph)
    depth = 1 + max(-y for _, y in position.values())
    width = 1 + max(abs(x) for x, _ in position.values())
    figure, axes = plt.subplots(figsize=(4.0 + 3.2 * width, 1.0 + 0.42 * depth))
    nx.draw_networkx_edges(
        graph, position, ax=axes, edge_color="#888888", arrowsize=6, width=0.7, node_size=500, min_target_margin=8
    )
    for vertex, (x, y) in position.items():
        colour = _WORKER_COLOUR if graph.nodes[vertex]["worker"] else _CLIENT_COLOUR
        box = {"boxstyle": "round,pad=0.25", "facecolor": colour, "edgecolor": "#555555", "linewidth": 0.6}
        axes.text(x, y, graph.nodes[vertex]["label"], ha="center", va="center", fontsize=7, bbox=box)
    title = f"{bundle.plan.base_model}: client (blue), worker on ciphertexts (orange)"
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
    axes.margins(0.08, 0.01)
    try:
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise InputError(f"cannot write {path}: {reason_of(error)}") from error
    finally:
        plt.close(figure)


def plan_graph(model: ir.Model) -> nx.DiGraph:
    """Return the operators of a client plan as a directed graph, without constants and shape arithmetic."""
    graph = nx.DiGraph()
    hidden = {"Constant", "Reshape", "Transpose", "Unsqueeze", "Cast", "Split"}
    for value in model.graph.inputs:
        if ".lora_" not in str(value.name):
            graph.add_node(value.name, label=value.name, worker=False)
    drawn: dict[ir.Value, list[str]] = {value: [str(value.name)] for value in model.graph.inputs}
    for node in model.graph:
        sources = [s for value in node.inputs if value is not None for s in drawn.get(value, []) if s in graph]
        if node.op_type in hidden:
            shown = sources
        else:
            shown = [str(node.outputs[0].name)]
            remote = node.op_type == "RemoteLinear"
            where = module_path(node).removeprefix("model.")
            graph.add_node(shown[0], label=f"{'Linear' if remote else node.op_type}\n{where}", worker=remote)
            graph.add_edges_from((source, shown[0]) for source in dict.fromkeys(sources))
        for output in node.outputs:
            drawn[output] = shown
    return graph


def _positions(graph: nx.DiGraph) -> dict[str, tuple[float, float]]:
    """Lay vertices out by longest path from the inputs, evenly spread within a layer."""
    position: dict[str, tuple[float, float]] = {}
    for layer, vertices in enumerate(nx.topological_generations(graph)):
        for index, vertex in enumerate(vertices):
            position[vertex] = (index - (len(vertices) - 1) / 2, -float(layer))
    return position
