"""Small graphs in ONNX's text form, and what the tests of passes do with them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.interpreter import Interpreter
from hecompile.ir import ORIGIN, PLACEMENT
from hecompile.legality import QUANTIZED, Stage
from hecompile.operators import Context
from hecompile.pipeline import PASSES, Step, run_steps

_HEADER = '<ir_version: 10, opset_import: ["" : 23, "hecompile" : 1]>\n'


def parse(text: str, origins: Mapping[str, str] | None = None) -> ir.Model:
    """A model from ONNX text without its header. `origins`: output name of a node → module path it came from."""
    model = ir.from_onnx_text(_HEADER + text)
    wanted = dict(origins or {})
    for node in model.graph:
        path = wanted.pop(str(node.outputs[0].name), None)
        if path is not None:
            node.metadata_props[ORIGIN] = path
    assert not wanted, f"no node makes {sorted(wanted)}"
    return model


def run_pass(model: ir.Model, name: str, stage: Stage = QUANTIZED, **options: object) -> ir.passes.PassResult:
    """Run the pass registered as `name`; its result must be legal at `stage`. Raises what the pipeline raises."""
    results: list[ir.passes.PassResult] = []
    transform = PASSES[name](**options)

    class Recorded(ir.passes.InPlacePass):
        def call(self, model: ir.Model) -> ir.passes.PassResult:
            results.append(transform(model))
            return results[-1]

    run_steps(model, [Step(name, Recorded(), stage)])
    return results[0]


def evaluate(model: ir.Model, context: Context | None = None, **inputs: Tensor) -> Tensor:
    """The only output of `model`, by the interpreter."""
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
