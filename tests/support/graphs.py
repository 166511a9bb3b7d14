"""Small graphs in ONNX's text form, and what the tests of passes do with them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from hecompile.compiler.pipeline import PASSES, run_step
from hecompile.errors import HecompileError
from hecompile.graph.interpreter import Interpreter
from hecompile.graph.ir import ORIGIN, PLACEMENT, print_model
from hecompile.graph.legality import QUANTIZED, Stage, check_stage
from hecompile.graph.operators import Context, RemoteProduct
from hecompile.plan.circuits import SplitPlan
from tests.support.tiny import coarse

_HEADER = '<ir_version: 10, opset_import: ["" : 23, "hecompile" : 1]>\n'


def parse(text: str, origins: Mapping[str, str] | None = None) -> ir.Model:
    """Parse a model from ONNX text without its header. `origins`: output name of a node → module path that it comes from."""
    model = ir.from_onnx_text(_HEADER + text)
    wanted = dict(origins or {})
    for node in model.graph:
        path = wanted.pop(str(node.outputs[0].name), None)
        if path is not None:
            node.metadata_props[ORIGIN] = path
    assert not wanted, f"no node makes {sorted(wanted)}"
    return model


def run_pass(model: ir.Model, name: str, stage: Stage = QUANTIZED, **options: object) -> ir.passes.PassResult:
    """Run the pass registered as `name`; its result must be legal at `stage`."""
    result: ir.passes.PassResult = PASSES[name](**options)(model)
    check_stage(result.model, stage)
    return result


def prepared(model: ir.Model, policy: str = "offload") -> ir.Model:
    """`model` with secrecy and placement, as the passes after `place` expect it."""
    run_pass(model, "annotate_secrecy")
    run_pass(model, "place", policy=policy)
    return model


def refused(model: ir.Model, name: str, stage: Stage = QUANTIZED, **options: object) -> HecompileError:
    """Return the error with which the pipeline refuses `model` at the pass registered as `name`."""
    with pytest.raises(HecompileError) as caught:
        run_step(model, name, PASSES[name](**options), stage)
    return caught.value


def evaluate(model: ir.Model, context: Context | None = None, **inputs: Tensor) -> Tensor:
    """Compute the only output of `model` by the interpreter."""
    (output,) = Interpreter(model).run(inputs, context).values()
    return output


def placements(model: ir.Model) -> dict[str, str]:
    """Output name → placement, of the nodes that may stand on either side."""
    return {
        str(node.outputs[0].name): node.metadata_props[PLACEMENT]
        for node in model.graph
        if node.op_type == "QuantizedLinear"
    }


def integers(*shape: int, seed: int = 0, largest: int = 4) -> Tensor:
    """Whole numbers as float32: sums and products of few of them are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text_of(plan: SplitPlan) -> str:
    """Print the client plan and a line per circuit; nothing in it depends on the last digits of a float."""
    lines = [
        f"circuit {circuit.name}: {p.in_features} -> {p.out_features} {circuit.weight.dtype}, "
        f"{p.upload_bits} bits up, {p.reply_bits} down\n"
        for circuit in plan.circuits
        for p in (circuit.parameters,)
    ]
    return re.sub(r"_crest=[\d.e+-]+", "_crest=*", coarse(print_model(plan.client))) + "".join(lines)


def product_of(plan: SplitPlan) -> RemoteProduct:
    """Return a product that computes remote linears by the circuits' weights, in the clear."""
    weights = {circuit.name: torch.from_numpy(circuit.weight.copy()).float() for circuit in plan.circuits}

    def product(linear: str, x: Tensor, scale: Tensor) -> Tensor:
        forward, backward = weights[f"{linear}.forward"], weights.get(f"{linear}.backward")
        assert backward is None or torch.equal(forward, backward.T)
        return x @ forward * scale

    return product
