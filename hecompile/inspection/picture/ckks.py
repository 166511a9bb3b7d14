"""Draw the plan of `hecompile ckks export`: the worker's sums and products, and the refreshes of the client."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from hecompile.errors import InputError
from hecompile.graph.ir import module_path
from hecompile.inspection.ckks import CkksBundle
from hecompile.inspection.picture.folding import Diagram, fold
from hecompile.inspection.picture.operators import Operator, Quantity, plain, read_operators
from hecompile.inspection.picture.rendering import check_picture, draw


def draw_ckks(bundle: CkksBundle, path: Path) -> None:
    """Draw a plan into an SVG or PNG file.

    Raises InputError for another type, a place that cannot be written, or a client's half, which has no circuit.
    """
    check_picture(path)
    if bundle.model is None:
        raise InputError("a client's half has no circuit to draw; give the worker's half or both")
    title = f"plan {bundle.plan.plan_id[:16]} of {bundle.plan.model}, under CKKS"
    draw(ckks_diagram(bundle, bundle.model), title, "bytes per evaluation, of any number of sequences", path)


def ckks_diagram(bundle: CkksBundle, model: ir.Model) -> Diagram:
    """Return a circuit's operators, layers that are alike folded into one, with what the client encrypts and decrypts."""
    fresh = bundle.parameters.ciphertext_bytes(bundle.parameters.levels)
    stale = bundle.parameters.ciphertext_bytes(0)

    def describe(node: ir.Node, name: str, sources: tuple[str, ...]) -> Operator:
        if node.op_type != "Refresh":
            return plain(node, name, sources, worker=True)
        count = bundle.traffic.refreshes[name]
        return Operator(
            name, module_path(node), "decrypt, encrypt", False, sources,
            facts=(Quantity("{} ciphertexts", (count,)),),
            arriving=(Quantity("← {} to refresh", (count * stale,), True),),
            leaving=(Quantity("{} fresh →", (count * fresh,), True),),
        )  # fmt: skip

    sent = Quantity("{} →", (bundle.traffic.inputs * fresh / len(model.graph.inputs),), True)
    inputs = [
        (value, Operator(str(value.name), "", str(value.name), False, (), leaving=(sent,)))
        for value in model.graph.inputs
    ]
    operators = read_operators(model, inputs, describe)
    received = Quantity("← {}", (bundle.traffic.outputs * stale,), True)
    results = tuple(str(value.name) for value in model.graph.outputs)
    decrypted = Operator("the client's logits", "", "decrypted logits", False, results, arriving=(received,))
    return fold([*operators, decrypted])
