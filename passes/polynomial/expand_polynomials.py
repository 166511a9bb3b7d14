"""Lower an approximated graph to sums, products, constants, frozen linears and moves of entries.

    input_ids, attention_bias, position_ids → logits          inputs_embeds f32 [B, S, H] → logits f32 [B, S, V] or [B, 1, V]
    PowerAttention(q, k, v, bias)              →  MatMul, Mul, ReduceSum, …   (`hecompile.polynomial.expansions`)
    PolynomialRMSNorm, PolynomialSiLU, ComposedSiLU, RotaryEmbedding, RepeatKV, Lora  →  likewise

The sequence length is fixed, positions are 0 … S - 1: cos and sin are constants, the causal mask a constant of zeros and
ones [S, S]. The embedding is cut off: the client looks tokens up. Constants are folded so that they cost no level: gains and
scales into the next Linear, the factors of the scores into the rotary tables, others onto the shallower operand of a product
(`hecompile.polynomial.graph_values`). The function is that of the approximated graph on sequences of S tokens, up to
the rounding of float32. LoRA matrices that are graph inputs stay inputs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from hecompile.errors import InputError, LegalityError
from hecompile.graph.interpreter import evaluate_node
from hecompile.graph.ir import ATTENTION_OPERATORS, DOMAIN, attributes_of, constant_of, module_path, remove_unused
from hecompile.polynomial import expansions
from hecompile.polynomial.graph_values import GraphBuilder, GraphValue, concatenated

EMBEDDINGS = "inputs_embeds"


@dataclass(frozen=True)
class ExpandPolynomials(ir.passes.FunctionalPass):
    """Expand the graph for sequences of one length.

    sequence_length: S of every sequence. last_only: logits of the last position alone, [B, 1, V].
    Raises InputError for a length under 2; LegalityError naming a node that is no polynomial.
    """

    sequence_length: int
    last_only: bool = False

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise InputError(f"the sequence length must be at least 2, got {self.sequence_length}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = ir.Graph([], [], nodes=[], opset_imports=dict(model.graph.opset_imports), name=model.graph.name)
        expanded = ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)
        expanded.metadata_props.update(model.metadata_props)
        _Expansion(model, GraphBuilder(graph), self.sequence_length, self.last_only).run()
        remove_unused(expanded)
        return ir.passes.PassResult(expanded, True)


class _Expansion:
    """Walk once over the old graph. Each value is a constant (numpy) or a GraphValue; the token ids have no value."""

    def __init__(self, model: ir.Model, builder: GraphBuilder, length: int, last_only: bool) -> None:
        self.old, self.builder, self.length, self.last_only = model.graph, builder, length, last_only
        self.mask = np.tril(np.ones((length, length)))
        self.constants: dict[ir.Value, np.ndarray] = {}
        self.values: dict[ir.Value, GraphValue] = {}
        self.last_attention: ir.Node | None = None
        self.prescale: dict[ir.Value, np.ndarray] = {}
        """Queries and keys → factors [S] that their rotary tables take up."""
        self.rescale: dict[ir.Value, float] = {}
        """Outputs of linears → factor that their weights take up."""

    def run(self) -> None:
        self._plan_factors()
        for value in self.old.inputs:
            self._input(value)
        for node in self.old:
            self.builder.origin = module_path(node)
            self._node(node)
        for value in self.old.outputs:
            output = self.values[value].settled()
            output.value.name = str(value.name)
            self.builder.graph.outputs.append(output.value)

    def _plan_factors(self) -> None:
        """Decide the factor that a value gets where it is made, for the sake of its only reader."""
        for node in self.old:
            if node.op_type in ATTENTION_OPERATORS and node.domain == DOMAIN:
                self.last_attention = node
                attributes = attributes_of(node)
                expansions.check_polynomial(node.op_type, attributes)
                q, k = node.inputs[:2]
                assert q is not None and k is not None
                self.prescale[q] = expansions.query_factor(node.op_type, attributes, self.mask)
                key = np.full(self.length, expansions.key_factor(node.op_type, attributes))
                self.prescale[k] = key
                if (repeat := k.producer()) is not None and repeat.op_type == "RepeatKV" and repeat.inputs[0] is not None:
                    self.prescale[repeat.inputs[0]] = key
            elif node.op_type in ("PolynomialSiLU", "ComposedSiLU") and node.inputs[0] is not None:
                self._rescale_at_linears(node.inputs[0], 1 / attributes_of(node)["domain_upper"])

    def _rescale_at_linears(self, value: ir.Value, factor: float) -> None:
        """Let the linears that make `value` make it `factor` times as large."""
        producer = value.producer()
        if producer is None or len(value.uses()) != 1:
            return
        if producer.op_type == "Add":
            for part in producer.inputs:
                if part is not None:
                    self._rescale_at_linears(part, factor)
        elif producer.op_type in ("Linear", "Lora"):
            self.rescale[value] = factor

    def _input(self, value: ir.Value) -> None:
        name = str(value.name)
        if name == "position_ids":
            self.constants[value] = np.arange(self.length)[None]
        elif name == "attention_bias":
            bias = np.where(self.mask > 0, 0.0, np.finfo(np.float32).min).astype(np.float32)
            self.constants[value] = bias[None, None]
        elif name != "input_ids":
            shape = _shape(value, self.length)
            new = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
            self.builder.graph.inputs.append(new)
            self.values[value] = GraphValue(self.builder, new, shape, 0)

    def _embeddings(self, node: ir.Node) -> None:
        table = node.inputs[0]
        assert table is not None and table.shape is not None
        shape = ("B", self.length, int(table.shape[1]))  # type: ignore[arg-type]
        new = ir.Value(name=EMBEDDINGS, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        self.builder.graph.inputs.insert(0, new)
        self.values[node.outputs[0]] = GraphValue(self.builder, new, shape, 0)

    def _constant(self, value: ir.Value | None) -> np.ndarray | None:
        if value is None:
            return None
        return self.constants[value] if value in self.constants else constant_of(value)

    def _node(self, node: ir.Node) -> None:
        if node.op_type == "Gather" and any(str(v.name) == "input_ids" for v in node.inputs if v is not None):
            self._embeddings(node)
            return
        if all(value is None or value not in self.values for value in node.inputs):
            self._fold(node)
            return
        expand = _EXPANSIONS.get((node.domain, node.op_type))
        if expand is None:
            raise LegalityError(
                f"{node.op_type} of {module_path(node) or node.name} cannot be expanded to sums and products; run "
                "approximate_softmax, approximate_rmsnorm and approximate_silu before expand_polynomials"
            )
        results = expand(self, node)
        for value, result in zip(node.outputs, results if isinstance(results, list) else [results], strict=True):
            self.values[value] = result

    def _fold(self, node: ir.Node) -> None:
        """Evaluate a node whose inputs are constants."""
        if node.op_type == "Constant":
            return
        arguments = [None if v is None else torch.from_numpy(np.array(self._known(node, v))) for v in node.inputs]
        for value, result in zip(node.outputs, evaluate_node(node, arguments), strict=True):
            self.constants[value] = result.numpy()

    def _known(self, node: ir.Node, value: ir.Value | None) -> np.ndarray:
        array = self._constant(value)
        if array is None:
            raise LegalityError(f"{node.op_type} of {module_path(node)}: {value and value.name} is not a constant")
        return array

    def _integers(self, node: ir.Node, index: int) -> list[int]:
        return [int(number) for number in self._known(node, node.inputs[index]).reshape(-1)]

    def _of(self, node: ir.Node, index: int = 0) -> GraphValue:
        value = node.inputs[index]
        assert value is not None
        return self.values[value]

    def _linear(self, node: ir.Node) -> GraphValue:
        weight, factor = node.inputs[1], self.rescale.get(node.outputs[0], 1.0)
        assert weight is not None
        return self.builder.linear(self._of(node), weight, self._known(node, weight), factor).with_factor(1 / factor)

    def _lora(self, node: ir.Node) -> GraphValue:
        factor = self.rescale.get(node.outputs[0], 1.0)
        x, a, b = (self._of(node, index) for index in range(3))
        inner = x.settled() @ a.transposed((1, 0))  # [B, S, r]
        b = (b.transposed((1, 0)) * (factor * attributes_of(node)["scaling"])).settled()
        return (inner.settled() @ b).with_factor(1 / factor)

    def _binary(self, node: ir.Node) -> GraphValue:
        apply = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul}[node.op_type]
        left, right = (self._constant(value) for value in node.inputs)
        constant = left if right is None else right
        if constant is None:
            return apply(self._of(node, 0), self._of(node, 1))
        if constant.size != 1 or (node.op_type == "Sub" and left is not None):
            raise LegalityError(f"{node.op_type} of {module_path(node)} by a constant tensor is not supported")
        return apply(self._of(node, 0 if left is None else 1), float(constant.reshape(())))

    def _attention(self, node: ir.Node) -> GraphValue:
        q, k, v = (self._prescaled(node, index) if index < 2 else self._of(node, index) for index in range(3))
        mask = self._known(node, node.inputs[3]).reshape(self.length, self.length)
        mask = np.exp(mask.astype(np.float64))
        if not np.array_equal(mask, self.mask):
            raise LegalityError(f"{module_path(node)}: the attention bias is not the causal one")
        if self.last_only and node is self.last_attention:
            q, mask = q.sliced(2, self.length - 1, self.length), mask[-1:]
            self._narrow(node)
        return expansions.attention(node.op_type, attributes_of(node), q, k, v, mask)

    def _prescaled(self, node: ir.Node, index: int) -> GraphValue:
        """Return q or k times its factor: in its rotary table already, or else by a product."""
        value = node.inputs[index]
        assert value is not None
        x, factor = self._of(node, index), self.prescale[value]
        made = value.producer()
        if made is not None and made.op_type == "RepeatKV":
            made = made.inputs[0].producer() if made.inputs[0] is not None else None
        if (made is not None and made.op_type == "RotaryEmbedding") or (factor == 1.0).all():
            return x
        if (factor == factor[0]).all():
            return x * float(factor[0])
        return x.times_array(factor[:, None])

    def _narrow(self, attention: ir.Node) -> None:
        """Slice the values that are read after the last attention: only their last position counts."""
        later: set[ir.Value] = set()
        passed = False
        for node in self.old:
            if passed:
                later.update(value for value in node.inputs if value is not None)
            passed |= node is attention
        for value in later & self.values.keys():
            x = self.values[value]
            if len(x.shape) == 3 and x.shape[1] == self.length:
                self.values[value] = x.sliced(1, self.length - 1, self.length)

    def _rotary(self, node: ir.Node) -> GraphValue:
        cos, sin = (self._known(node, node.inputs[index]) for index in (1, 2))
        return expansions.rotary(self._of(node), cos, sin, self.prescale.get(node.outputs[0]))

    def _norm(self, node: ir.Node) -> GraphValue:
        return expansions.rms_norm(attributes_of(node), self._of(node), self._known(node, node.inputs[1]))

    def _reshape(self, node: ir.Node) -> GraphValue:
        x, target = self._of(node), self._integers(node, 1)
        shape: list[int | str] = [x.shape[axis] if dim == 0 else dim for axis, dim in enumerate(target)]
        shape[0] = x.shape[0]
        if -1 in shape:
            known = math.prod(int(dim) for dim in shape[1:] if dim != -1)
            shape[shape.index(-1)] = math.prod(int(dim) for dim in x.shape[1:]) // known
        return x.reshaped(tuple(shape))

    def _transpose(self, node: ir.Node) -> GraphValue:
        return self._of(node).transposed(attributes_of(node)["perm"])

    def _slice(self, node: ir.Node) -> GraphValue:
        x = self._of(node)
        starts, ends, axes, steps = (self._integers(node, index) for index in range(1, 5))
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            size = int(x.shape[axis])
            first, last, _ = slice(start, end, step).indices(size)
            if step != 1:
                raise LegalityError(f"Slice of {module_path(node)} has a step of {step}")
            x = x.sliced(axis % len(x.shape), first, last)
        return x


Expansion = Callable[[_Expansion, ir.Node], GraphValue]


def _concat(walk: _Expansion, node: ir.Node) -> GraphValue:
    return concatenated([walk._of(node, index) for index in range(len(node.inputs))], attributes_of(node)["axis"])


_EXPANSIONS: dict[tuple[str, str], Expansion] = {
    **{("", name): _Expansion._binary for name in ("Add", "Sub", "Mul")},
    ("", "Neg"): lambda walk, node: walk._of(node) * -1.0,
    ("", "Reshape"): _Expansion._reshape,
    ("", "Transpose"): _Expansion._transpose,
    ("", "Slice"): _Expansion._slice,
    ("", "Concat"): _concat,
    (DOMAIN, "Linear"): _Expansion._linear,
    (DOMAIN, "Lora"): _Expansion._lora,
    **{(DOMAIN, name): _Expansion._attention for name in ATTENTION_OPERATORS},
    (DOMAIN, "PolynomialRMSNorm"): _Expansion._norm,
    (DOMAIN, "PolynomialSiLU"): lambda walk, node: expansions.series_silu(attributes_of(node), walk._of(node)),
    (DOMAIN, "ComposedSiLU"): lambda walk, node: expansions.composed_silu(attributes_of(node), walk._of(node)),
    (DOMAIN, "RotaryEmbedding"): _Expansion._rotary,
    (DOMAIN, "RepeatKV"): lambda walk, node: expansions.repeat_kv(walk._of(node), attributes_of(node)["repeats"]),
}


def _shape(value: ir.Value, length: int) -> tuple[int | str, ...]:
    """Make a shape static but for the batch: a symbolic dimension is the batch where first, the length elsewhere."""
    if value.shape is None:
        raise LegalityError(f"the shape of the graph input {value.name} is not known")
    return tuple(d if isinstance(d, int) else "B" if axis == 0 else length for axis, d in enumerate(value.shape))
