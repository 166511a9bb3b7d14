"""Lower the encrypted linear of a worker circuit to standard integer ONNX operators.

    reply = hecompile.EncryptedLinear(ciphertext, weight) {upload_bits=B, reply_bits=C}
      →  word  = Σ_l uint32(MatMulInteger(ciphertext[l], weight)) · 2^(8l)              (mod 2^32, read mod 2^(8L))
         reply = the top C of the 8L bits of word + 2^(8L-C-1), as byte planes

A word of B bits is the highest of the L bytes that hold it; where 8 does not divide C, the lowest bits of the lowest reply
plane are 0. The ciphertext word is `c = Σ_l plane_l · 2^(8l)`, so by linearity `c·W = Σ_l (plane_l·W) · 2^(8l)`. An
int16 weight is `W = W_0 + 256·W_1` in balanced bytes, and `c·W = Σ_(l+k < L) (plane_l·W_k) · 2^(8(l+k))`: the terms left out
are multiples of 2^(8L). Every product is a uint8 × int8 integer matrix product whose int32 accumulator cannot overflow while
`255 · 128 · features_in < 2^31`, and everything after it is arithmetic mod 2^32. The result is exact: the only rounding is
the one that `reply_bits < upload_bits` asks for, of at most half a unit of the lowest bit that is sent. `Add` and `Mul`
are used and never `ReduceSum`, which ONNX Runtime computes inexactly on integers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from hecompile.errors import LegalityError
from hecompile.graph.ir import DOMAIN, ORIGIN, add_initializer, nodes_of_type, replace_node
from hecompile.integers import balanced_bytes
from hecompile.plan.encrypted_linear import (
    ENCRYPTED_LINEAR,
    REPLY_BITS,
    UPLOAD_BITS,
    bit_counts,
    check_encrypted_linear,
)
from hecompile.word_sizes import bytes_of, unused_bits

STANDARD_OPERATORS = frozenset({"Slice", "MatMulInteger", "Cast", "Mul", "Add", "BitShift", "BitwiseAnd", "Concat"})
INTEGER_TYPES = frozenset(
    {ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.INT32, ir.DataType.UINT32, ir.DataType.INT64}
)


class LowerWorker(ir.passes.InPlacePass):
    """Replace every `hecompile.EncryptedLinear` of a worker circuit; `modified` is False when there is none.

    requires: each such node has a uint8 ciphertext [L, T, features_in], an int8 or int16 initializer [features_in,
    features_out], `8 <= reply_bits <= upload_bits <= 32` and `features_in <= 65793`.
    ensures: only standard operators, integer tensors and constants, and an origin on every node.
    The model's metadata say the bits of a word, which byte planes do not show.
    Both raise `LegalityError`, which the pass base chains into `PreconditionError` and `PostconditionError`.
    """

    def requires(self, model: ir.Model) -> None:
        for node in nodes_of_type(model, ENCRYPTED_LINEAR):
            check_encrypted_linear(node)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = list(nodes_of_type(model, ENCRYPTED_LINEAR))
        for node in nodes:
            lowered, reply = lower_encrypted_linear(node)
            model.metadata_props.update(zip((UPLOAD_BITS, REPLY_BITS), map(str, bit_counts(node)), strict=True))
            weight = node.inputs[1]
            replace_node(node, lowered, [reply])
            if weight is not None and weight.name is not None and not weight.uses():
                del model.graph.initializers[weight.name]  # int16, now in bytes
        model.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, modified=bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.domain != "" or node.op_type not in STANDARD_OPERATORS:
                raise LegalityError(
                    f"worker circuit {model.graph.name}: node {node.name} is {node.domain}.{node.op_type}; "
                    f"a worker runs only {', '.join(sorted(STANDARD_OPERATORS))}"
                )
            if ORIGIN not in node.metadata_props:
                raise LegalityError(f"worker circuit {model.graph.name}: node {node.name} does not say its origin")
        for value in _values(model.graph):
            if value.dtype not in INTEGER_TYPES:
                dtype = "no type" if value.dtype is None else value.dtype.name
                raise LegalityError(
                    f"worker circuit {model.graph.name}: value {value.name} has {dtype}; only integers are exact"
                )


def lower_encrypted_linear(node: ir.Node) -> tuple[list[ir.Node], ir.Value]:
    """Return the standard nodes that compute `node`, in order, and the value that replaces its output."""
    upload_bits, reply_bits = bit_counts(node)
    limbs, reply_bytes = bytes_of(upload_bits), bytes_of(reply_bits)
    ciphertext, weight = node.inputs
    assert ciphertext is not None and ciphertext.shape is not None and weight is not None
    assert weight.const_value is not None
    tokens = ciphertext.shape[1]
    features_in, features_out = weight.const_value.shape.numpy()
    emit = _Emitter(node)

    axis = emit.constant("limb_axis", np.array([0], dtype=np.int64))
    bounds = [emit.constant(f"limb_{k}", np.array([k], dtype=np.int64)) for k in range(limbs + 1)]
    plane_shape = ir.Shape([1, tokens, features_in])
    product_shape = ir.Shape([1, tokens, features_out])

    scales = {k: emit.constant(f"scale_{k}", np.array(2 ** (8 * k), dtype=np.uint32)) for k in range(1, limbs)}
    word: ir.Value | None = None
    for j, digit in enumerate(_weight_digits(node, emit)):
        for k in range(limbs - j):  # a term with j + k ≥ limbs is 0 mod 2^(8·limbs)
            name = f"{k}" if j == 0 else f"{k}_{j}"
            plane = emit("Slice", [ciphertext, bounds[k], bounds[k + 1], axis], f"plane_{name}", "UINT8", plane_shape)
            product = emit("MatMulInteger", [plane, digit], f"product_{name}", "INT32", product_shape)
            term = emit("Cast", [product], f"term_{name}", "UINT32", product_shape, to=ir.DataType.UINT32)
            if j + k > 0:
                term = emit("Mul", [term, scales[j + k]], f"scaled_{name}", "UINT32", product_shape)
            word = term if word is None else emit("Add", [word, term], f"word_{name}", "UINT32", product_shape)
    assert word is not None

    dropped_bits, dropped_bytes = 8 * limbs - reply_bits, limbs - reply_bytes
    if dropped_bits:
        half = emit.constant("half", np.array(2 ** (dropped_bits - 1), dtype=np.uint32))
        word = emit("Add", [word, half], "rounded", "UINT32", product_shape)
    masks = [emit.constant("low_byte", np.array(255, dtype=np.uint32))] * reply_bytes
    if unused := unused_bits(reply_bits):
        masks[0] = emit.constant("top_bits", np.array(255 >> unused << unused, dtype=np.uint32))
    planes = []
    for r, mask in enumerate(masks):
        byte = word
        if shift := 8 * (dropped_bytes + r):
            amount = emit.constant(f"shift_{shift}", np.array(shift, dtype=np.uint32))
            byte = emit("BitShift", [word, amount], f"shifted_{r}", "UINT32", product_shape, direction="RIGHT")
        # The mask makes the narrowing cast in-range: ONNX leaves an out-of-range cast to the implementation.
        byte = emit("BitwiseAnd", [byte, mask], f"masked_{r}", "UINT32", product_shape)
        planes.append(emit("Cast", [byte], f"reply_{r}", "UINT8", product_shape, to=ir.DataType.UINT8))
    reply_shape = ir.Shape([reply_bytes, tokens, features_out])
    return emit.nodes, emit("Concat", planes, "reply", "UINT8", reply_shape, axis=0)


def _weight_digits(node: ir.Node, emit: _Emitter) -> list[ir.Value]:
    """Return the weight as int8 constants, lowest byte first; an int8 weight is used as it is."""
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    if weight.dtype == ir.DataType.INT8:
        return [weight]
    digits = balanced_bytes(weight.const_value.numpy())
    return [emit.constant(f"weight_{j}", np.ascontiguousarray(digit)) for j, digit in enumerate(digits)]


class _Emitter:
    """Collect the nodes made from one node; their names and origins start with its name."""

    def __init__(self, source: ir.Node) -> None:
        assert isinstance(source.graph, ir.Graph)
        self._graph = source.graph
        self._prefix = source.name or ENCRYPTED_LINEAR
        self._origin = source.metadata_props.get(ORIGIN) or self._prefix
        self.nodes: list[ir.Node] = []

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        return add_initializer(self._graph, f"{self._prefix}.{name}", array)

    def __call__(
        self, op_type: str, inputs: list[ir.Value], name: str, dtype: str, shape: ir.Shape, **attributes: int | str
    ) -> ir.Value:
        full_name = f"{self._prefix}.{name}"
        node = ir.node(op_type, inputs, attributes, name=full_name)
        node.metadata_props[ORIGIN] = self._origin
        output = node.outputs[0]
        output.name, output.type, output.shape = full_name, ir.TensorType(ir.DataType[dtype]), shape
        self.nodes.append(node)
        return output


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
