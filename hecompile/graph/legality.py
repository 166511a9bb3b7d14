"""Hold as data what is legal at each stage of the pipeline, and check it between passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from hecompile.errors import LegalityError
from hecompile.graph.ir import DOMAIN, module_path

_SHAPE_OPERATORS = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Concat", "Split", "Slice", "Constant"})
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Cos", "Sin", "Cast"})
_PLAIN = frozenset(
    {
        "Pow", "Sqrt", "Reciprocal", "ReduceMean", "ReduceSum", "Sigmoid", "Tanh", "Erf", "Relu", "Gelu",
        "LayerNormalization", "TopK", "ScatterElements",
    }
)  # fmt: skip
"""What families of models compute besides, as the exporter wrote it: it stays so, on the client."""
_EXPORTER_ONLY = frozenset({"Shape", "Expand", "Identity", "CastLike", "Gemm", "SplitToSequence", "SequenceAt"})
_MODEL = frozenset({"Gather", "MatMul", "Softmax"}) | _SHAPE_OPERATORS | _ELEMENTWISE | _PLAIN
_APPROXIMATED = frozenset(
    {"PowerAttention", "GaussianAttention", "ChebyshevAttention", "PolynomialRMSNorm", "PolynomialSiLU", "ComposedSiLU"}
)
_RAISED = frozenset({"Linear", "RMSNorm", "SiLU", "RotaryEmbedding", "RepeatKV", "QuantizedSiLU"}) | _APPROXIMATED


@dataclass(frozen=True)
class Stage:
    """Name a set of legal operators: standard ones and ones of the `hecompile` domain."""

    name: str
    standard: frozenset[str]
    custom: frozenset[str] = frozenset()


EXPORTED = Stage("exported", _MODEL | _EXPORTER_ONLY)
CANONICAL = Stage("canonical", _MODEL, _RAISED)
ADAPTED = Stage("adapted", _MODEL, _RAISED | {"Lora", "Rotate"})
_ROUTED = frozenset({"TakeRows", "PutRows"})
QUANTIZED = Stage("quantized", _MODEL, ADAPTED.custom | _ROUTED | {"QuantizedLinear"})
CLIENT_PLAN = Stage("client plan", _MODEL, QUANTIZED.custom | {"RemoteLinear"})
FUSED_CLIENT_PLAN = Stage(
    "fused client plan", CLIENT_PLAN.standard, CLIENT_PLAN.custom | {"Attention", "SwiGLU", "GatedLora"}
)
POLYNOMIAL = Stage(
    "polynomial",
    _SHAPE_OPERATORS | {"Add", "Sub", "Mul", "Neg", "MatMul", "ReduceSum", "Gather"},
    frozenset({"Linear"}),
)
"""Sums, products, constants and moves of entries: what can be evaluated on ciphertexts."""
REFRESHED = Stage("refreshed", POLYNOMIAL.standard, POLYNOMIAL.custom | {"Refresh"})

TypeRule = Callable[[ir.Node], str | None]
"""Returns what is wrong with a node's inputs, or None."""


def _weight_rule(*dtypes: ir.DataType) -> TypeRule:
    def rule(node: ir.Node) -> str | None:
        weight = node.inputs[1]
        if weight is None or weight.shape is None or len(weight.shape) != 2 or weight.dtype not in dtypes:
            return f"input 1 must be a matrix of {' or '.join(dtype.name for dtype in dtypes)}"
        x = node.inputs[0]
        if x is not None and x.shape is not None and isinstance(x.shape[-1], int) and x.shape[-1] != weight.shape[1]:
            return f"x has {x.shape[-1]} features, the weight takes {weight.shape[1]}"
        return None

    return rule


def _lora_rule(node: ir.Node) -> str | None:
    a, b = node.inputs[1:3]
    if a is None or b is None or a.shape is None or b.shape is None or a.shape[0] != b.shape[1]:
        return "lora_A [r, in] and lora_B [out, r] must share r"
    return None


def _gain_rule(node: ir.Node) -> str | None:
    x, weight = node.inputs
    if x is None or weight is None or weight.shape is None or len(weight.shape) != 1:
        return "the gain must be a vector"
    if x.shape is not None and isinstance(x.shape[-1], int) and x.shape[-1] != weight.shape[0]:
        return f"x has {x.shape[-1]} features, the gain {weight.shape[0]}"
    return None


TYPE_RULES: dict[str, tuple[int, TypeRule | None]] = {
    "Linear": (2, _weight_rule(ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.FLOAT16)),
    "QuantizedLinear": (3, _weight_rule(ir.DataType.INT8, ir.DataType.INT16)),
    "RemoteLinear": (2, None),
    "Rotate": (1, None),
    "Lora": (3, _lora_rule),
    "RMSNorm": (2, _gain_rule),
    "SiLU": (1, None),
    "RotaryEmbedding": (3, None),
    "RepeatKV": (1, None),
    "Attention": (4, None),
    "PowerAttention": (4, None),
    "GaussianAttention": (4, None),
    "ChebyshevAttention": (4, None),
    "PolynomialRMSNorm": (2, _gain_rule),
    "PolynomialSiLU": (1, None),
    "ComposedSiLU": (1, None),
    "QuantizedSiLU": (1, None),
    "Refresh": (1, None),
    "TakeRows": (2, None),
    "PutRows": (2, None),
    "SwiGLU": (2, None),
    "GatedLora": (5, _lora_rule),
}
"""Custom operator → number of inputs and its type rule."""


def check_stage(model: ir.Model, stage: Stage) -> None:
    """Check that every node is legal at `stage`.

    Raises LegalityError for the first that is not, with its operator, module and inputs, and the rule.
    """
    for node in model.graph:
        legal = stage.custom if node.domain == DOMAIN else stage.standard if node.domain == "" else frozenset()
        if node.op_type not in legal:
            raise _illegal(node, stage, f"operator {node.domain or 'onnx'}::{node.op_type} is not legal here")
        if node.domain == DOMAIN:
            arity, rule = TYPE_RULES[node.op_type]
            if len(node.inputs) != arity:
                raise _illegal(node, stage, f"takes {arity} inputs, has {len(node.inputs)}")
            problem = rule(node) if rule else None
            if problem:
                raise _illegal(node, stage, problem)


def _illegal(node: ir.Node, stage: Stage, problem: str) -> LegalityError:
    inputs = ", ".join("none" if v is None else f"%{v.name}:{v.shape}" for v in node.inputs)
    outputs = ", ".join(f"%{v.name}" for v in node.outputs)
    where = module_path(node) or "the graph"
    return LegalityError(f"stage {stage.name!r}, {where}: {outputs} = {node.op_type}({inputs}): {problem}")
