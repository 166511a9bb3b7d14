"""Assign every node to the client or the worker by a minimum s-t cut over measured costs.

    QuantizedLinear(secret x, public Q, s)  →  @client or @worker, whichever makes the whole step cheaper
    everything else                          →  @client (it must see plaintext)

The cut (source side = client): an edge source → node costs what the worker needs for the node, node → sink what the client
needs; a value that crosses is paid once however many nodes on the other side use it (an auxiliary vertex per value and
direction). Costs are seconds per token for one forward and one backward pass. Minimum cut = cheapest placement (Stone,
"Multiprocessor scheduling with the aid of network flow algorithms", 1977).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import networkx as nx
import onnx_ir as ir

from hecompile.errors import InputError
from hecompile.graph.ir import PLACEMENT, SECRECY, in_block, module_path
from hecompile.graph.secrecy import WORKER_OPERATORS, check_placement
from hecompile.plan.costs import CostModel

Policy = Literal["offload", "cheapest"]


@dataclass(frozen=True)
class Place(ir.passes.InPlacePass):
    """Write the placement of every node into its metadata.

    policy "offload" (default) pins the decoder's quantised linears to the worker, so that the client holds none of their
    weights; "cheapest" leaves them to the cut. Raises InputError for another policy.
    """

    policy: Policy = "offload"
    costs: CostModel = field(default_factory=CostModel)

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise InputError(f"policy must be 'offload' or 'cheapest', got {self.policy!r}")

    def requires(self, model: ir.Model) -> None:
        for node in model.graph:
            if any(SECRECY not in output.metadata_props for output in node.outputs):
                raise ir.passes.PreconditionError("run annotate_secrecy before place")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        on_worker = self._worker_side(model)
        modified = False
        for node in model.graph:
            side = "worker" if node in on_worker else "client"
            modified |= node.metadata_props.get(PLACEMENT) != side
            node.metadata_props[PLACEMENT] = side
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        check_placement(model)

    def _worker_side(self, model: ir.Model) -> set[ir.Node]:
        cut = nx.DiGraph()
        cut.add_nodes_from(("client", "worker"))
        for node in model.graph:
            if (node.domain, node.op_type) not in WORKER_OPERATORS:
                cut.add_edge("client", node)  # no capacity: infinite, pinned to the client
                continue
            weight = node.inputs[1]
            assert weight is not None and weight.shape is not None
            multiplications = math.prod(weight.shape.numpy())
            cut.add_edge("client", node, capacity=self.costs.remote(multiplications))
            # A head that was quantised is meant for the worker.
            if self.policy == "offload" or (module_path(node) and not in_block(node)):
                cut.add_edge(node, "worker")
            else:
                cut.add_edge(node, "worker", capacity=self.costs.local(multiplications))
        for value in _computed_values(model):
            self._add_crossing(cut, value)
        _, (_, worker_side) = nx.minimum_cut(cut, "client", "worker")
        return {vertex for vertex in worker_side if isinstance(vertex, ir.Node)}

    def _add_crossing(self, cut: nx.DiGraph, value: ir.Value) -> None:
        """Charge the value once if any consumer stands on the other side of its producer. The client consumes results."""
        price = self.costs.crossing(_features(value))
        producer = value.producer() if value.producer() is not None else "client"
        up, down = ("up", value), ("down", value)
        cut.add_edge(producer, up, capacity=price)
        cut.add_edge(down, producer, capacity=price)
        for consumer in _consumers(value):
            cut.add_edge(up, consumer)
            cut.add_edge(consumer, down)


def _computed_values(model: ir.Model) -> list[ir.Value]:
    inputs = [value for value in model.graph.inputs if _consumers(value)]
    return inputs + [output for node in model.graph for output in node.outputs if _consumers(output)]


def _consumers(value: ir.Value) -> list[ir.Node | str]:
    """Return the vertices that need the value."""
    return [*value.consumers(), *(["client"] if value.is_graph_output() else [])]


def _features(value: ir.Value) -> int:
    """Count elements per token of a value [batch, sequence, features]; other shapes never cross and count as one."""
    last = value.shape[-1] if value.shape is not None and len(value.shape) else 1
    return last if isinstance(last, int) else 1
