"""Show a bundle that `hecompile ckks export` wrote: parameters, depth, refreshes and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from rich.table import Table

from hecompile.bundles.ckks import CkksPlan, open_worker, read_table
from hecompile.ckks.circuit import PolynomialCircuit
from hecompile.ckks.parameters import MAX_MODULUS_BITS, CkksParameters
from hecompile.errors import InputError
from hecompile.graph.ir import module_path
from hecompile.he.security import show_bits
from hecompile.inspection.ckks_traffic import CkksTraffic, predicted_traffic
from hecompile.inspection.kinds import kind_of, span
from hecompile.inspection.polynomial import depth_table, graph_json, node_table
from hecompile.inspection.prediction import megabytes


@dataclass(frozen=True)
class CkksBundle:
    """Hold what is shown of a bundle. Without the worker's half there is no graph, and the traffic is an upper bound."""

    plan: CkksPlan
    parameters: CkksParameters
    traffic: CkksTraffic
    model: ir.Model | None

    @property
    def most(self) -> str:
        return "at most " if self.model is None else ""


def open_bundle(directory: Path) -> CkksBundle:
    """Open a whole export, or one half of it.

    Raises:
        InputError: the bundle is damaged, or its halves do not belong together.
        SecurityError: the parameters have less than 128 bits of security.
    """
    if (directory / "client").is_dir() or (directory / "worker").is_dir():
        plan = CkksPlan.read(directory / "client")
        read_table(directory / "client", plan)
        opened = open_worker(directory / "worker")
        if opened[0] != plan:
            raise InputError(f"{directory}: client and worker are halves of different plans; export again")
    elif (directory / "circuit.onnx").is_file():
        opened = open_worker(directory)
    else:
        plan = CkksPlan.read(directory)
        read_table(directory, plan)
        return CkksBundle(plan, CkksParameters.from_fields(plan.parameters), _at_most(plan), None)
    plan, circuit, parameters = opened
    _require_same_refreshes(directory, plan, circuit)
    traffic = predicted_traffic(circuit, parameters)
    return CkksBundle(plan, parameters, traffic, ir.Model(circuit.graph, ir_version=10))


def bundle_tables(bundle: CkksBundle, layers: bool = False, nodes: bool = False) -> list[Table]:
    """Return the tables of a bundle: parameters and totals, the graph by kinds of modules, and what is asked for besides.

    Args:
        layers: whether modules that stand in several layers have a row each.
        nodes: whether to add a row per node.

    Raises InputError where `nodes` is asked for without a circuit.
    """
    tables = [_plan_table(bundle), *([_refresh_table(bundle, layers)] if bundle.traffic.refreshes else [])]
    if bundle.model is not None:
        tables.append(depth_table(bundle.model, bundle.parameters.literal, layers))
        return [*tables, node_table(bundle.model)] if nodes else tables
    if nodes:
        raise InputError("a client's half has no circuit, and so no nodes to show; give the worker's half or both")
    return tables


def bundle_json(bundle: CkksBundle) -> dict[str, Any]:
    """Return what the tables show as JSON values. docs/command-line.md lists the keys."""
    plan, parameters, traffic = bundle.plan, bundle.parameters, bundle.traffic
    graph = {} if bundle.model is None else {"graph": graph_json(bundle.model)}
    return {
        "what": "ckks plan",
        "plan_id": plan.plan_id,
        "model": plan.model,
        "parameters": {**asdict(parameters.literal), "slots": parameters.slots},
        "sequence_length": plan.sequence_length,
        "last_only": plan.last_only,
        "depth": plan.depth,
        "exact": bundle.model is not None,
        "per_evaluation": {
            "bytes_up": traffic.bytes_up(parameters),
            "bytes_down": traffic.bytes_down(parameters),
            "inputs": traffic.inputs,
            "outputs": traffic.outputs,
            "refreshed": traffic.refreshed,
        },
        "evaluation_key_bytes": parameters.evaluation_key_bytes,
        "refreshes": [
            {"value": name.removesuffix(".fresh"), "ciphertexts": n} for name, n in traffic.refreshes.items()
        ],
        **graph,
    }


def _require_same_refreshes(directory: Path, plan: CkksPlan, circuit: PolynomialCircuit) -> None:
    if plan.refreshes != {name: list(shape) for name, shape in circuit.refreshed.items()}:
        raise InputError(f"{directory}: the refreshes of plan.json are not those of the circuit; export again")


def _at_most(plan: CkksPlan) -> CkksTraffic:
    """Bound the traffic from the plan alone: masked and repeated entries, which are not sent, count here."""
    rows = 1 if plan.last_only else plan.sequence_length
    refreshes = {name: math.prod(shape) for name, shape in plan.refreshes.items()}
    return CkksTraffic(plan.sequence_length * plan.hidden, refreshes, rows * plan.vocabulary)


def _plan_table(bundle: CkksBundle) -> Table:
    plan, parameters, traffic, most = bundle.plan, bundle.parameters, bundle.traffic, bundle.most
    literal, slots = parameters.literal, parameters.slots
    up, down = traffic.bytes_up(parameters), traffic.bytes_down(parameters)
    allowed = MAX_MODULUS_BITS[parameters.ring_dim]
    table = Table(title=f"polynomial plan {plan.plan_id[:16]} of {plan.model}, under CKKS", show_header=False)
    table.add_column("what", overflow="fold", no_wrap=True)
    table.add_column("value", overflow="fold")
    rows = {
        "bytes per evaluation up": f"{most}{up} ({megabytes(up)}), {math.ceil(up / slots)} per sequence of full slots",
        "bytes per evaluation down": f"{most}{down} ({megabytes(down)}), {math.ceil(down / slots)} per sequence",
        "evaluation keys": f"{parameters.evaluation_key_bytes} bytes up, once per session",
        "refreshes": f"{len(traffic.refreshes)} of {most}{traffic.refreshed} ciphertexts",
        "ring dimension": str(parameters.ring_dim),
        "slots": f"{slots}, sequences per evaluation at most",
        "levels": f"{parameters.levels} of {literal.scale_bits} bits",
        "modulus": f"{literal.modulus_bits} bits, the special prime included; {allowed} are allowed",
        "security": show_bits(parameters.security_bits),
        "depth of the graph": f"{plan.depth} levels without refreshes",
        "sequence": f"{plan.sequence_length} tokens; logits of "
        + ("the last one" if plan.last_only else "all of them"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _refresh_table(bundle: CkksBundle, layers: bool) -> Table:
    table = Table(title="refreshes", show_header=False)
    table.add_column("where", overflow="fold", no_wrap=True)
    table.add_column("what", overflow="fold")
    for name, value in _each_refresh(bundle) if layers or bundle.model is None else _refreshes_by_kind(bundle):
        table.add_row(name, value)
    return table


def _each_refresh(bundle: CkksBundle) -> Iterator[tuple[str, str]]:
    for value, count in bundle.traffic.refreshes.items():
        yield f"refresh of {value.removesuffix('.fresh')}", f"{bundle.most}{count} ciphertexts"


def _refreshes_by_kind(bundle: CkksBundle) -> Iterator[tuple[str, str]]:
    """Put the refreshes of a module in all layers into one row."""
    assert bundle.model is not None
    kinds: dict[str, list[int]] = {}
    for node in bundle.model.graph:
        if node.op_type == "Refresh":
            count = bundle.traffic.refreshes[str(node.outputs[0].name)]
            kinds.setdefault(kind_of(module_path(node) or "the graph"), []).append(count)
    for kind, counts in kinds.items():
        each = (
            f"{len(counts)} refreshes of {span(counts)} ciphertexts" if len(counts) > 1 else f"{counts[0]} ciphertexts"
        )
        yield kind, each
