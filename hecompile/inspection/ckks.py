"""Show a bundle that `hecompile ckks export` wrote: parameters, depth, refreshes and bytes."""

from __future__ import annotations

import math
from pathlib import Path

import onnx_ir as ir
from rich.table import Table

from hecompile.bundles.ckks import CkksPlan, open_worker, read_table
from hecompile.ckks.circuit import PolynomialCircuit
from hecompile.ckks.parameters import MAX_MODULUS_BITS, CkksParameters
from hecompile.errors import InputError
from hecompile.he.security import show_bits
from hecompile.inspection.ckks_traffic import CkksTraffic, predicted_traffic
from hecompile.inspection.polynomial import depth_table, node_table
from hecompile.inspection.prediction import megabytes


def bundle_tables(directory: Path, nodes: bool = False) -> list[Table]:
    """Return the tables of a whole export, or of one half of it.

    The client's half has no circuit, so that its bytes are an upper bound.

    Args:
        nodes: whether to add a row per node.

    Raises:
        InputError: the bundle is damaged, its halves do not belong together, or `nodes` is asked for without a circuit.
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
        if nodes:
            raise InputError(f"{directory} is a client's half, which has no circuit; give the worker's half or both")
        return [_plan_table(plan, CkksParameters.from_fields(plan.parameters), _at_most(plan), "at most ")]
    plan, circuit, parameters = opened
    _require_same_refreshes(directory, plan, circuit)
    model = ir.Model(circuit.graph, ir_version=10)
    tables = [_plan_table(plan, parameters, predicted_traffic(circuit, parameters), "")]
    tables.append(depth_table(model, parameters.literal))
    return [*tables, node_table(model)] if nodes else tables


def _require_same_refreshes(directory: Path, plan: CkksPlan, circuit: PolynomialCircuit) -> None:
    if plan.refreshes != {name: list(shape) for name, shape in circuit.refreshed.items()}:
        raise InputError(f"{directory}: the refreshes of plan.json are not those of the circuit; export again")


def _at_most(plan: CkksPlan) -> CkksTraffic:
    """Bound the traffic from the plan alone: masked and repeated entries, which are not sent, count here."""
    rows = 1 if plan.last_only else plan.sequence_length
    refreshes = {name: math.prod(shape) for name, shape in plan.refreshes.items()}
    return CkksTraffic(plan.sequence_length * plan.hidden, refreshes, rows * plan.vocabulary)


def _plan_table(plan: CkksPlan, parameters: CkksParameters, traffic: CkksTraffic, most: str) -> Table:
    literal, slots = parameters.literal, parameters.slots
    up, down = traffic.bytes_up(parameters), traffic.bytes_down(parameters)
    allowed = MAX_MODULUS_BITS[parameters.ring_dim]
    table = Table(title=f"polynomial plan {plan.plan_id[:16]} of {plan.model}, under CKKS", show_header=False)
    rows = {
        "ring dimension": str(parameters.ring_dim),
        "slots": f"{slots}, sequences per evaluation at most",
        "levels": f"{parameters.levels} of {literal.scale_bits} bits",
        "modulus": f"{literal.modulus_bits} bits, the special prime included; {allowed} are allowed",
        "security": show_bits(parameters.security_bits),
        "depth of the graph": f"{plan.depth} levels without refreshes",
        "sequence": f"{plan.sequence_length} tokens; logits of "
        + ("the last one" if plan.last_only else "all of them"),
        "refreshes": f"{len(traffic.refreshes)} of {most}{traffic.refreshed} ciphertexts",
        "evaluation keys": f"{parameters.evaluation_key_bytes} bytes up, once per session",
        "bytes per evaluation up": f"{most}{up} ({megabytes(up)}), {math.ceil(up / slots)} per sequence of full slots",
        "bytes per evaluation down": f"{most}{down} ({megabytes(down)}), {math.ceil(down / slots)} per sequence",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    if traffic.refreshes:
        table.add_section()
    for value, count in traffic.refreshes.items():
        table.add_row(f"refresh of {value.removesuffix('.fresh')}", f"{most}{count} ciphertexts")
    return table
