"""Mark every value public or secret.

    tokens, LoRA matrices, the attention bias (it tells lengths)  →  secret
    frozen weights, constants, positions                           →  public
    a node's outputs                                               →  secret if any input is, else public

The lattice has two points and the rule is monotone, so one sweep in graph order reaches the least fixed point (Denning,
"A lattice model of secure information flow", 1976).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from hecompile.graph.ir import SECRECY

PUBLIC_INPUTS = frozenset({"position_ids"})
"""Graph inputs that do not depend on the data: every other input is secret."""


@dataclass(frozen=True)
class AnnotateSecrecy(ir.passes.InPlacePass):
    """Write the secrecy of every value into its metadata."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for value in model.graph.inputs:
            modified |= _mark(value, "public" if value.name in PUBLIC_INPUTS else "secret")
        for value in model.graph.initializers.values():
            modified |= _mark(value, "public")
        for node in model.graph:
            secret = any(value is not None and value.metadata_props[SECRECY] == "secret" for value in node.inputs)
            for output in node.outputs:
                modified |= _mark(output, "secret" if secret else "public")
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        for output in model.graph.outputs:
            if output.metadata_props.get(SECRECY) != "secret":
                raise ir.passes.PostconditionError(f"the graph output {output.name} does not depend on any secret")


def _mark(value: ir.Value, secrecy: str) -> bool:
    """Write the secrecy of `value`; return whether it changed."""
    changed = value.metadata_props.get(SECRECY) != secrecy
    value.metadata_props[SECRECY] = secrecy
    return changed
