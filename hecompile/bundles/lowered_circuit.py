"""Check the ONNX file of a worker's circuit against its manifest entry, and say where its weight lies.

Engines trust the shapes in the manifest, and compiled kernels read by them. So a file is used only if it is the lowered
circuit of passes/offload/lower_worker.py with those very dimensions: operators, constants, types, the extent of the weight.
Every field of the format that such a file does not need is refused.

The computation is compared by value numbering (Cocke and Schwartz, "Programming Languages and Their Compilers", 1970): each
distinct expression of the wanted circuit gets a number, and each node of the file must have one of them. Names so do not
matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto

from hecompile.bundles.triton_repository import INPUT_NAME, OUTPUT_NAME, WEIGHT_FILE
from hecompile.word_sizes import unused_bits

ONNX_OPSET = 18
"""The first with BitwiseAnd."""
ONNX_IR_VERSION = 10
MAX_FEATURES_IN = (2**31 - 1) // (255 * 128)
"""Largest inner dimension whose |uint8 × int8| sums stay below 2^31: 65793."""
MAX_CIRCUIT_BYTES = 1 << 20
"""Largest circuit file: weights above 64 KiB have files of their own, and the rest takes a few KiB."""

_MOST_NODES = 256
_FIELDS: dict[type, frozenset[str]] = {
    onnx.ModelProto: frozenset({"ir_version", "producer_name", "producer_version", "doc_string", "opset_import", "graph"}),
    onnx.GraphProto: frozenset({"name", "doc_string", "node", "initializer", "input", "output", "value_info"}),
    onnx.NodeProto: frozenset({"name", "input", "output", "op_type", "attribute", "metadata_props", "doc_string"}),
    onnx.AttributeProto: frozenset({"name", "type", "i", "s"}),
    onnx.TensorProto: frozenset({"name", "dims", "data_type", "raw_data", "data_location", "external_data"}),
}
_CONSTANTS: dict[int, np.dtype[Any]] = {TensorProto.INT64: np.dtype("<i8"), TensorProto.UINT32: np.dtype("<u4")}
_Dims = tuple[int | None, ...]
_Type = tuple[int, _Dims]
"""Element type and dimensions; None stands for the number of tokens."""


class Shape(Protocol):
    """Name what of a manifest entry a circuit must have."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def upload_limbs(self) -> int: ...

    @property
    def reply_bytes(self) -> int: ...

    @property
    def reply_bits(self) -> int: ...


@dataclass(frozen=True)
class StoredDigit:
    """Hold the place of one weight digit, int8 [in_features, out_features] in C order.

    content: its bytes, where they are in the circuit's own file; else they begin at `offset` of the weight file.
    """

    content: bytes | None = None
    offset: int = 0


class CircuitError(ValueError):
    """Say what of a circuit's file is not as the manifest wants it."""


def read_circuit(path: Path, shape: Shape, weight_bytes: int) -> tuple[StoredDigit, ...]:
    """Return the digits of the weight, lowest first.

    Args:
        path: the ONNX file.
        shape: the circuit's entry in the manifest.
        weight_bytes: size of the weight file beside it; 0 where there is none.

    Raises:
        CircuitError: the file is not the lowered circuit of that shape, or its weight is not all in the files.
        OSError: as files do.
    """
    graph = _parse(path).graph
    digits = list(dict.fromkeys(node.input[1] for node in graph.node if _multiplies(node)))
    stored = {tensor.name: _stored(tensor, shape, weight_bytes) for tensor in graph.initializer if _is_weight(tensor)}
    if not 1 <= len(digits) <= 2 or not stored.keys() >= set(digits):
        raise CircuitError("its weight is not one or two int8 constants")
    _require_computation(graph, shape, digits)
    return tuple(stored[digit] for digit in digits)


def _parse(path: Path) -> onnx.ModelProto:
    """Read the file of a circuit as far as its format goes."""
    if (size := path.stat().st_size) > MAX_CIRCUIT_BYTES:
        raise CircuitError(f"it has {size} bytes, more than any circuit")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except DecodeError:
        raise CircuitError("it is no ONNX file") from None
    _require_known_fields(model)
    opsets = [(one.domain, one.version) for one in model.opset_import]
    if model.ir_version != ONNX_IR_VERSION or opsets != [("", ONNX_OPSET)]:
        raise CircuitError(f"it is not ONNX of version {ONNX_IR_VERSION} with operators of version {ONNX_OPSET}")
    if len(model.graph.node) > _MOST_NODES or len(model.graph.initializer) > _MOST_NODES:
        raise CircuitError("it has more nodes or constants than any circuit")
    return model


def _require_computation(graph: onnx.GraphProto, shape: Shape, digits: list[str]) -> None:
    """Raise CircuitError unless the graph computes the reply of a circuit of that shape, and declares its types rightly."""
    wanted = _LoweredCircuit(shape, len(digits))
    types: dict[str, _Type] = {INPUT_NAME: (TensorProto.UINT8, (shape.upload_limbs, None, shape.in_features))}
    values: dict[str, int | None] = {INPUT_NAME: wanted.ciphertext}
    for tensor in graph.initializer:
        _define(types, tensor.name, tensor.data_type, tuple(tensor.dims))
        if not _is_weight(tensor):
            values[tensor.name] = wanted.find("constant", *_small_constant(tensor))
    values |= {digit: wanted.find("weight", place) for place, digit in enumerate(digits)}
    for node in graph.node:
        value = wanted.find(node.op_type, *_attributes(node), *(_known(values, name) for name in node.input))
        if value is None or len(node.output) != 1:
            raise CircuitError(f"its node {node.name[:200]!r} is not one of a circuit with the manifest's dimensions")
        _define(types, node.output[0], *wanted.type_of(value))
        values[node.output[0]] = value
    if values.get(OUTPUT_NAME) != wanted.reply:
        raise CircuitError("it does not compute the reply of a circuit with the manifest's dimensions")
    _require_types(graph, types)


class _LoweredCircuit:
    """Number the expressions of the lowered circuit of a shape; see `hecompile.passes.offload.lower_worker` for its maths.

    Attributes:
        ciphertext, reply: the numbers of its input and its output.
    """

    def __init__(self, shape: Shape, digits: int) -> None:
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._types: dict[int, _Type] = {}
        limbs = shape.upload_limbs
        plane: _Type = (TensorProto.UINT8, (1, None, shape.in_features))
        product: _Dims = (1, None, shape.out_features)
        uint32, one_byte = (TensorProto.UINT32, product), (TensorProto.UINT8, product)
        self.ciphertext = self._add(None, "ciphertext")
        indices = [self._constant(TensorProto.INT64, (1,), value) for value in range(limbs + 1)]
        word: int | None = None
        for j in range(digits):
            weight = self._add(None, "weight", j)
            for k in range(limbs - j):
                limb = self._add(plane, "Slice", self.ciphertext, indices[k], indices[k + 1], indices[0])
                whole = self._add((TensorProto.INT32, product), "MatMulInteger", limb, weight)
                term = self._add(uint32, "Cast", ("to", TensorProto.UINT32), whole)
                if j + k:
                    term = self._add(uint32, "Mul", term, self._uint32(256 ** (j + k)))
                word = term if word is None else self._add(uint32, "Add", word, term)
        assert word is not None
        if dropped := 8 * limbs - shape.reply_bits:
            word = self._add(uint32, "Add", word, self._uint32(2 ** (dropped - 1)))
        planes: list[int] = []
        kept = 255 >> unused_bits(shape.reply_bits) << unused_bits(shape.reply_bits)
        for shift in range(8 * (limbs - shape.reply_bytes), 8 * limbs, 8):
            byte = word
            if shift:
                byte = self._add(uint32, "BitShift", ("direction", b"RIGHT"), word, self._uint32(shift))
            masked = self._add(uint32, "BitwiseAnd", byte, self._uint32(255 if planes else kept))
            planes.append(self._add(one_byte, "Cast", ("to", TensorProto.UINT8), masked))
        reply = (TensorProto.UINT8, (shape.reply_bytes, None, shape.out_features))
        self.reply = self._add(reply, "Concat", ("axis", 0), *planes)

    def find(self, *expression: Any) -> int | None:
        """Return the number of an expression; None where the circuit has no such thing."""
        return self._numbers.get(expression)

    def type_of(self, value: int) -> _Type:
        """Return the type of what a node computes."""
        return self._types[value]

    def _add(self, kind: _Type | None, *expression: Any) -> int:
        number = self._numbers.setdefault(expression, len(self._numbers))
        if kind is not None:
            self._types[number] = kind
        return number

    def _constant(self, dtype: int, dims: tuple[int, ...], value: int) -> int:
        return self._add(None, "constant", dtype, dims, value)

    def _uint32(self, value: int) -> int:
        return self._constant(TensorProto.UINT32, (), value)


def _is_weight(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_type == TensorProto.INT8)


def _multiplies(node: onnx.NodeProto) -> bool:
    return bool(node.op_type == "MatMulInteger" and len(node.input) == 2)


def _known(values: dict[str, int | None], name: str) -> int:
    number = values.get(name)
    if number is None:
        raise CircuitError(f"its value {name[:200]!r} is not one of a circuit with the manifest's dimensions")
    return number


def _attributes(node: onnx.NodeProto) -> Iterator[tuple[str, int | bytes]]:
    for attribute in node.attribute:
        field = {AttributeProto.INT: "i", AttributeProto.STRING: "s"}.get(attribute.type)
        if {known.name for known, _ in attribute.ListFields()} != {"name", "type", field}:
            raise CircuitError(f"its node {node.name[:200]!r} has an attribute that no circuit has")
        yield attribute.name, attribute.i if field == "i" else attribute.s


def _define(types: dict[str, _Type], name: str, dtype: int, dims: _Dims) -> None:
    if not name or name in types:
        raise CircuitError(f"it defines {name[:200]!r} twice, or without a name")
    types[name] = dtype, dims


def _small_constant(tensor: onnx.TensorProto) -> tuple[int, tuple[int, ...], int]:
    """Return (type, dimensions, value) of a constant with one element."""
    dtype = _CONSTANTS.get(tensor.data_type)
    dims, external = tuple(tensor.dims), tensor.data_location == TensorProto.EXTERNAL
    if dtype is None or dims not in ((), (1,)) or external or len(tensor.raw_data) != dtype.itemsize:
        raise CircuitError(f"its constant {tensor.name[:200]!r} is not one of a circuit")
    return tensor.data_type, dims, int(np.frombuffer(tensor.raw_data, dtype)[0])


def _stored(tensor: onnx.TensorProto, shape: Shape, weight_bytes: int) -> StoredDigit:
    """Find the bytes of a weight digit, and check that all of them are there."""
    count = shape.in_features * shape.out_features
    if tuple(tensor.dims) != (shape.in_features, shape.out_features):
        raise CircuitError(
            f"its weight is {list(tensor.dims)[:4]}, the manifest says [{shape.in_features}, {shape.out_features}]"
        )
    if tensor.data_location != TensorProto.EXTERNAL:
        if len(tensor.raw_data) != count or tensor.external_data:
            raise CircuitError(f"its weight has {len(tensor.raw_data)} bytes instead of {count}")
        return StoredDigit(bytes(tensor.raw_data))
    place = {entry.key: entry.value for entry in tensor.external_data}
    if place.get("location") != WEIGHT_FILE:
        raise CircuitError(f"its weight refers to {place.get('location', '')[:200]!r}, outside the bundle")
    known = place.keys() <= {"location", "offset", "length"} and len(place) == len(tensor.external_data)
    offset, length = _natural(place.get("offset", "0")), _natural(place.get("length", str(count)))
    if not known or tensor.raw_data or length != count:
        raise CircuitError(f"the place of its weight is not one of {count} bytes")
    if offset + count > weight_bytes:
        raise CircuitError(f"its weight ends at byte {offset + count} of {WEIGHT_FILE}, which has {weight_bytes}")
    return StoredDigit(None, offset)


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise CircuitError(f"the place of its weight, {text[:40]!r}, is no number of bytes")
    return int(text)


def _require_known_fields(message: Any) -> None:
    """Raise CircuitError for a field, anywhere in the model, that circuits do not have."""
    for field, value in message.ListFields():
        if field.name not in _FIELDS[type(message)]:
            raise CircuitError(f"it has a field {field.name} in {type(message).__name__}, which no circuit has")
        for inner in value if field.is_repeated else (value,):
            if type(inner) in _FIELDS:
                _require_known_fields(inner)


def _require_types(graph: onnx.GraphProto, types: dict[str, _Type]) -> None:
    """Raise CircuitError unless every type that the graph declares is that of the value."""
    if [value.name for value in graph.input] != [INPUT_NAME] or [value.name for value in graph.output] != [OUTPUT_NAME]:
        raise CircuitError(f"its tensors in and out are not {INPUT_NAME} and {OUTPUT_NAME}")
    for declared in (*graph.input, *graph.output, *graph.value_info):
        kind = declared.type.tensor_type
        dims = tuple(None if dim.WhichOneof("value") == "dim_param" else dim.dim_value for dim in kind.shape.dim)
        if not kind.HasField("shape") or types.get(declared.name) != (kind.elem_type, dims):
            raise CircuitError(f"it declares another type of {declared.name[:200]!r} than the circuit has")
