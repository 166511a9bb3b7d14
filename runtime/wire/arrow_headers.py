"""Write and read the headers of Arrow messages that carry bytes as a column of uint8: a schema, and record batches.

A header is the flatbuffer `Message` of the Arrow columnar format (format/Message.fbs and format/Schema.fbs, metadata
version V5). Arrow's own readers unpack a compressed batch as they meet it; here a header is looked at first, and the body
stays where it is.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any, TypeVar

import flatbuffers
from flatbuffers import number_types
from flatbuffers.table import Table

from hecompile.errors import WorkerError

T = TypeVar("T")
_VERSION_5 = 4
_SCHEMA, _RECORD_BATCH = 1, 3
"""Values of the union MessageHeader."""
_TYPE_INT = 2
"""Value of the union Type."""
_STRUCT_BYTES = 16
"""FieldNode is (length, null count), Buffer is (offset, length), in int64."""
_ALIGNMENT = 8
_NOT_BYTES = "malformed message: the record batch is not one uint8 column"


def padding(size: int) -> bytes:
    """Return the zeros after a body of `size` bytes that the format wants."""
    return bytes(-size % _ALIGNMENT)


@functools.cache
def schema_header() -> bytes:
    """Return the header of the schema: one column of uint8, named payload, without nulls."""
    builder = flatbuffers.Builder(256)
    name = builder.CreateString("payload")
    integer = _table(builder, 2, {0: (builder.PrependInt32Slot, 8)})  # bitWidth; is_signed is false by default
    builder.StartVector(4, 0, 4)
    children = builder.EndVector()
    offset = builder.PrependUOffsetTRelativeSlot
    kind = builder.PrependUint8Slot, _TYPE_INT
    column = _table(builder, 7, {0: (offset, name), 2: kind, 3: (offset, integer), 5: (offset, children)})
    builder.StartVector(4, 1, 4)
    builder.PrependUOffsetTRelative(column)
    columns = builder.EndVector()
    return _message(builder, _SCHEMA, _table(builder, 4, {1: (offset, columns)}), 0)


@functools.lru_cache(64)
def batch_header(rows: int) -> bytes:
    """Return the header of a batch of `rows` bytes whose body is these bytes and their padding."""
    builder = flatbuffers.Builder(256)
    buffers = _structs(builder, [(0, 0), (0, rows)])  # validity, which a column without nulls lacks, and values
    nodes = _structs(builder, [(rows, 0)])
    offset = builder.PrependUOffsetTRelativeSlot
    batch = _table(builder, 5, {0: (builder.PrependInt64Slot, rows), 1: (offset, nodes), 2: (offset, buffers)})
    return _message(builder, _RECORD_BATCH, batch, rows + len(padding(rows)))


def check_schema(header: memoryview) -> None:
    """Raise WorkerError unless the header is that of a schema of one uint8 column."""
    _guarded(_check_schema, header)


def rows_of(header: memoryview, body: memoryview) -> memoryview:
    """Return the bytes of the only column of a record batch, a part of `body`.

    Raises WorkerError where the header is another, is compressed, or does not fit the body; no count in it is trusted.
    """
    start, rows = _guarded(_rows, header)
    if not 0 <= start <= start + rows <= len(body):
        raise WorkerError("malformed message: the record batch has more rows than bytes")
    return body[start : start + rows]


def _check_schema(header: memoryview) -> None:
    schema = _opened(header, _SCHEMA)
    if (columns := _vector(schema, 1)) is None or columns[1] != 1:
        raise WorkerError(_NOT_BYTES)
    column = Table(header, schema.Indirect(columns[0]))
    children = _vector(column, 5)
    plain = not column.Offset(_slot(4)) and (children is None or children[1] == 0)  # neither a dictionary nor nested
    if not plain or _scalar(column, 2, number_types.Uint8Flags) != _TYPE_INT:
        raise WorkerError(_NOT_BYTES)
    integer = _child(column, 3)
    if _scalar(integer, 0, number_types.Int32Flags) != 8 or _scalar(integer, 1, number_types.BoolFlags):
        raise WorkerError(_NOT_BYTES)


def _rows(header: memoryview) -> tuple[int, int]:
    """Return where the values begin in the body, and how many there are."""
    batch = _opened(header, _RECORD_BATCH)
    if batch.Offset(_slot(3)):
        raise WorkerError("the record batch is compressed: send it as it is")
    nodes, buffers = _vector(batch, 1), _vector(batch, 2)
    if nodes is None or buffers is None or nodes[1] != 1 or buffers[1] != 2:
        raise WorkerError(_NOT_BYTES)
    rows = _scalar(batch, 0, number_types.Int64Flags)
    length, nulls = struct.unpack_from("<qq", header, nodes[0])
    start, size = struct.unpack_from("<qq", header, buffers[0] + _STRUCT_BYTES)
    if nulls or length != rows or rows < 0 or size < rows:
        raise WorkerError("malformed message: the uint8 column has gaps")
    return start, rows


def _guarded(read: Callable[[memoryview], T], header: memoryview) -> T:
    """Read a header of somebody else. Raises WorkerError where its offsets lead out of it."""
    try:
        return read(header)
    except (struct.error, TypeError, ValueError, IndexError, OverflowError):
        raise WorkerError("malformed message: the header is no Arrow message") from None


def _opened(header: memoryview, kind: int) -> Table:
    """Return the schema or the record batch in a message. Raises WorkerError where it holds another kind."""
    message = Table(header, struct.unpack_from("<I", header)[0])
    if _scalar(message, 1, number_types.Uint8Flags) != kind:
        wanted = "schema" if kind == _SCHEMA else "record batch"
        raise WorkerError(f"malformed message: a {wanted} was expected, and an Arrow message of another kind came")
    return _child(message, 2)


def _slot(field: int) -> int:
    """Return the place of a field in the table of offsets, which begins with two sizes of two bytes."""
    return 4 + 2 * field


def _scalar(table: Table, field: int, flags: Any) -> Any:
    return table.GetSlot(_slot(field), 0, flags)


def _child(table: Table, field: int) -> Table:
    if not (offset := table.Offset(_slot(field))):
        raise ValueError(field)
    return Table(table.Bytes, table.Indirect(table.Pos + offset))


def _vector(table: Table, field: int) -> tuple[int, int] | None:
    """Return where the elements of a vector begin, and how many there are; None where there is no vector."""
    offset = table.Offset(_slot(field))
    return (table.Vector(offset), table.VectorLen(offset)) if offset else None


def _table(builder: Any, size: int, values: dict[int, tuple[Callable[[int, int, int], None], int]]) -> int:
    """Write a table of `size` fields, of which some have values; returns its offset."""
    builder.StartObject(size)
    for field, (prepend, value) in values.items():
        prepend(field, value, 0)
    return int(builder.EndObject())


def _structs(builder: Any, pairs: list[tuple[int, int]]) -> int:
    """Write a vector of structs of two int64; returns its offset. A flatbuffer is written from its end."""
    builder.StartVector(_STRUCT_BYTES, len(pairs), _ALIGNMENT)
    for first, second in reversed(pairs):
        builder.PrependInt64(second)
        builder.PrependInt64(first)
    return int(builder.EndVector())


def _message(builder: Any, kind: int, header: int, body_bytes: int) -> bytes:
    values = {
        0: (builder.PrependInt16Slot, _VERSION_5), 1: (builder.PrependUint8Slot, kind),
        2: (builder.PrependUOffsetTRelativeSlot, header), 3: (builder.PrependInt64Slot, body_bytes),
    }  # fmt: skip
    builder.Finish(_table(builder, 5, values))
    return bytes(builder.Output())
