"""Provide what every pass shares: the custom operator domain, metadata keys, graph helpers and the text form of a model.

The container is `onnx_ir`; nothing here wraps it. The custom domain `hecompile` holds the operators that have no
standard ONNX counterpart (`Linear` with a frozen weight, `RemoteLinear`, ...); `hecompile.graph.operators` is the
table of what each of them computes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

DOMAIN = "hecompile"
"""Domain of the operators that this compiler adds to ONNX."""

ATTENTION_OPERATORS = frozenset({"Attention", "PowerAttention", "GaussianAttention", "ChebyshevAttention"})
"""The operators, all of inputs (q, k, v, bias), that let positions of a sequence see each other."""

ATTENTION_BIAS, SLIDING_BIAS = "attention_bias", "sliding_attention_bias"
"""Names of the graph inputs that say which positions a query sees: all before it, and those within a window."""

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key of a node as exported: the module path of the checkpoint it came from, written by torch's exporter."""

ORIGIN = "hecompile.origin"
"""Metadata key of a node: its source (module path of the checkpoint, or the nodes it replaces)."""

SECRECY = "hecompile.secrecy"
"""Metadata key of a value: "public" or "secret"."""

PLACEMENT = "hecompile.placement"
"""Metadata key of a node: "client" or "worker"."""

RANGE = "hecompile.range"
"""Metadata key of a value: JSON {"max", "crest"} recorded by calibration; crest = max|x| / rms, per token."""

GRADIENT_RANGE = "hecompile.gradient_range"
"""Metadata key of a value: the range of the gradient that flows back into it, in the form of `RANGE`."""

PRODUCT_PEAK = "hecompile.product_peak"
"""Metadata key of a Linear's result: the largest |W_i·x| / (max_j |W_ij| · ‖x‖₂) of an output and token in calibration."""

GRADIENT_PEAK = "hecompile.gradient_peak"
"""Metadata key of what Linears read: the largest entry of a token's gradient, which their products with W sum up to, in
proportion to the Euclidean norm of what is multiplied, each gradient times max_j |W_ij| of its row."""

APPROXIMATION_RANGE = "hecompile.approximation_range"
"""Metadata key of the result of an attention, RMSNorm or SiLU: JSON of what calibration saw where a polynomial would stand
(`hecompile.polynomial.ranges`)."""

WINDOW = "hecompile.window"
"""Metadata key of a graph input that is an attention bias: how many positions a query sees, itself included."""

SAMPLES = "hecompile.samples"
"""Key in a value's `meta`, which no file holds: float32 [T, features], what calibration saw a Linear read."""

WEIGHT_BITS = "hecompile.weight_bits"
"""Metadata key of a Linear: how many bits its weights are to have as integers."""

LEVEL = "hecompile.level"
"""Metadata key of a value: its multiplicative depth."""

_SLICE = re.compile(r"\.slice\([^()]*\)")
"""What the exporter adds to the path of a block that the model takes from a slice of its blocks."""
_SHORT_DTYPES = {"FLOAT": "f32", "DOUBLE": "f64", "FLOAT16": "f16", "BFLOAT16": "bf16", "INT64": "i64", "INT32": "i32"}
_SHORT_DTYPES |= {"INT8": "i8", "INT16": "i16", "UINT8": "u8", "UINT32": "u32", "BOOL": "bool"}
_PRINTED_CONSTANT_ELEMENTS = 8


def module_path(node: ir.Node) -> str:
    """Return the path of the checkpoint's module that `node` comes from, e.g. `model.layers.0.self_attn.q_proj`.

    It is read from the exporter's name scopes, as constant folding renames initializers. It is empty for a node outside
    every module. The first scope component is the export wrapper and is dropped.
    """
    if ORIGIN in node.metadata_props:
        return node.metadata_props[ORIGIN]
    raw = node.metadata_props.get(NAME_SCOPES)
    if raw is None:
        return ""
    scopes = ast.literal_eval(raw)
    # The last entry names the operator itself; the one before is the innermost module.
    innermost = scopes[-2] if len(scopes) >= 2 else ""
    return _SLICE.sub("", innermost.partition(".")[2])


def in_block(node: ir.Node) -> bool:
    """Tell whether a product comes from a numbered block of the decoder, and is no router's.

    Embedding, last norm and output head are in no block. A router is a product whose softmax is taken as it is: it chooses
    experts, which is the client's business.
    """
    routes = any(consumer.op_type == "Softmax" for output in node.outputs for consumer in output.consumers())
    return not routes and any(part.isdigit() for part in module_path(node).split("."))


def window_of(bias: ir.Value) -> int | None:
    """Return how many positions a query sees with this attention bias, itself included; None for all before it."""
    window = bias.metadata_props.get(WINDOW)
    return None if window is None else int(window)


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of a constant (initializer or `Constant` node), or None when `value` is computed."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def source_of(value: ir.Value | None) -> ir.Value | None:
    """Look through the casts and reshapes that the exporter puts on integer constants."""
    while value is not None and (producer := value.producer()) is not None and producer.op_type in ("Cast", "Reshape"):
        value = producer.inputs[0]
    return value


def attribute(node: ir.Node, name: str) -> object:
    """Return the value of attribute `name` of `node`. Raises KeyError when it has none."""
    return node.attributes[name].value


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """Return all attributes of `node` as Python values."""
    return {name: attr.value for name, attr in node.attributes.items()}


def single(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Round floats, also in lists, to float32, as a saved model holds them."""

    def rounded(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [rounded(item) for item in value]
        return float(np.float32(value)) if isinstance(value, float) else value

    return {name: rounded(value) for name, value in attributes.items()}


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register `array` under `name` and return its value. Raises ValueError when the name is taken."""
    if name in graph.initializers:
        raise ValueError(f"initializer {name} exists already")
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
    value.const_value = ir.Tensor(array, name=name)
    graph.initializers[name] = value
    return value


def replace_node(old: ir.Node, new: Iterable[ir.Node], outputs: Iterable[ir.Value]) -> None:
    """Put `new` where `old` stands, hand over the uses (and names, types and shapes) of its outputs, remove `old`."""
    graph = old.graph
    assert isinstance(graph, ir.Graph)
    nodes = list(new)
    graph.insert_before(old, nodes)
    for before, after in zip(old.outputs, outputs, strict=True):
        after.type = before.type or after.type
        after.shape = before.shape or after.shape
        after.metadata_props.update(before.metadata_props)
        name = before.name
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
        before.name = None
        after.name = name
    graph.remove(old, safe=True)


def nodes_of_type(model: ir.Model, op_type: str, domain: str = DOMAIN) -> Iterator[ir.Node]:
    """Yield the nodes of one operator in graph order; the graph may change meanwhile."""
    for node in list(model.graph):
        if node.op_type == op_type and node.domain == domain:
            yield node


def remove_unused(model: ir.Model) -> None:
    """Drop dead nodes and initializers."""
    common.RemoveUnusedNodesPass()(model)


# ---------------------------------------------------------------------------------------------------------------- text


def print_model(model: ir.Model) -> str:
    """Print the graph as deterministic text, which golden tests compare.

    It has inputs, initializers (types, and values of small ones), one line per node with types, attributes, placement and
    origin, and outputs.
    """
    lines = [f"model {key} = {value}" for key, value in sorted(model.metadata_props.items())]
    graph = model.graph
    lines += [f"input {_typed(value)}" for value in graph.inputs]
    lines += [f"const {_typed(value)}{_constant_text(value)}" for _, value in sorted(graph.initializers.items())]
    lines += [_node_text(node) for node in graph]
    lines += [f"output {_typed(value)}" for value in graph.outputs]
    return "\n".join(lines) + "\n"


def _typed(value: ir.Value) -> str:
    dtype = value.dtype
    dtype_text = "?" if dtype is None else _SHORT_DTYPES.get(dtype.name, dtype.name.lower())
    shape = "[?]" if value.shape is None else "[" + ",".join(str(dim) for dim in value.shape) + "]"
    secrecy = value.metadata_props.get(SECRECY)
    return f"%{value.name}: {dtype_text}{shape}" + (f" !{secrecy}" if secrecy else "")


def _constant_text(value: ir.Value) -> str:
    array = constant_of(value)
    if array is None or array.size > _PRINTED_CONSTANT_ELEMENTS:
        return ""
    return f" = {array.tolist()}"


def _node_text(node: ir.Node) -> str:
    outputs = ", ".join(_typed(value) for value in node.outputs)
    inputs = ", ".join("none" if value is None else f"%{value.name}" for value in node.inputs)
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    attributes = " ".join(f"{key}={_attribute_text(attr)}" for key, attr in sorted(node.attributes.items()))
    text = f"{outputs} = {name}({inputs})" + (f" {{{attributes}}}" if attributes else "")
    if placement := node.metadata_props.get(PLACEMENT):
        text += f" @{placement}"
    if origin := node.metadata_props.get(ORIGIN):
        text += f"  # {origin}"
    return text


def _attribute_text(attr: ir.Attr) -> str:
    if attr.type == ir.AttributeType.TENSOR:
        return str(attr.as_tensor().numpy().tolist())
    if attr.type == ir.AttributeType.FLOAT:
        return f"{attr.as_float():.7g}"
    return str(attr.value)
