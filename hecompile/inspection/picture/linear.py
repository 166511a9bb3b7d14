"""Draw the plan of `hecompile export llama`: the client's operators, and the linears that the worker multiplies by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from hecompile.bundles.client import ClientBundle
from hecompile.graph.ir import module_path
from hecompile.inspection.linear import Product
from hecompile.inspection.picture.folding import Diagram, fold
from hecompile.inspection.picture.operators import Operator, Quantity, plain, read_operators
from hecompile.inspection.picture.rendering import check_picture, draw


def draw_plan(bundle: ClientBundle, products: Sequence[Product], path: Path) -> None:
    """Draw a plan into an SVG or PNG file. Raises InputError for another type or a place that cannot be written."""
    check_picture(path)
    title = f"plan {bundle.plan_id[:16]} of {bundle.plan.base_model}"
    draw(plan_diagram(bundle.graph(), products), title, "bytes per token, forward and backward", path)


def plan_diagram(model: ir.Model, products: Sequence[Product]) -> Diagram:
    """Return a client plan's operators, layers that are alike folded into one. Matrices of LoRA are not drawn as inputs."""
    known = {(product.linear, product.direction): product for product in products}

    def describe(node: ir.Node, name: str, sources: tuple[str, ...]) -> Operator:
        if node.op_type != "RemoteLinear":
            return plain(node, name, sources, worker=False)
        module = module_path(node)
        return _remote(name, module, sources, known[module, "forward"], known.get((module, "backward")))

    inputs = [
        (value, Operator(str(value.name), "", str(value.name), worker=False, sources=()))
        for value in model.graph.inputs
        if ".lora_" not in str(value.name)
    ]
    return fold(read_operators(model, inputs, describe))


def _remote(name: str, module: str, sources: tuple[str, ...], forward: Product, backward: Product | None) -> Operator:
    """Describe a linear of the worker: x goes up and y comes down, the gradient of y goes up and that of x comes down."""
    up, down = ((backward.bytes_up,), (backward.bytes_down,)) if backward is not None and backward.trained else ((), ())
    return Operator(
        name, module, "Linear", True, sources,
        facts=(
            Quantity("{} → {}", (forward.in_features, forward.out_features)),
            Quantity("weights of {} bits", (forward.weight_bits,)),
        ),
        arriving=(Quantity("forward {} →", (forward.bytes_up,), True), Quantity("← backward {}", down, True)),
        leaving=(Quantity("← forward {}", (forward.bytes_down,), True), Quantity("backward {} →", up, True)),
    )  # fmt: skip
