"""Say which values training changes, and so which need a gradient: all others are constants of the text.

    LoRA matrices, and whatever is computed from one     →  trained: they differ from step to step, a gradient may pass
    tokens, positions, and what follows from these alone  →  the same for a text in every step, and without a gradient

One sweep in graph order finds them: a node's outputs are trained if any of its inputs is.
"""

from __future__ import annotations

import onnx_ir as ir

from hecompile.graph.ir import ATTENTION_BIAS, SLIDING_BIAS, nodes_of_type

_MASKS = frozenset({ATTENTION_BIAS, SLIDING_BIAS})
_WHOLE_NUMBERS = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})


def trained_values(model: ir.Model) -> frozenset[ir.Value]:
    """Return the values that depend on an input with a gradient.

    Such an input is any of real numbers that is no attention bias: the LoRA matrices in the graph of a model, and in one of
    some of its nodes the activations that these read.
    """
    trained = {value for value in model.graph.inputs if value.dtype not in _WHOLE_NUMBERS and value.name not in _MASKS}
    for node in model.graph:
        if any(value in trained for value in node.inputs if value is not None):
            trained.update(node.outputs)
    return frozenset(trained)


def without_gradient(model: ir.Model, op_type: str) -> frozenset[ir.Node]:
    """Return the nodes of one operator of the hecompile domain whose first input needs no gradient.

    For a linear it means that its backward product is never asked for.
    """
    trained = trained_values(model)
    return frozenset(node for node in nodes_of_type(model, op_type) if node.inputs[0] not in trained)
