"""Carry frames of `hecompile.runtime.wire.framing` as Arrow Flight messages, for the Flight server and client.

A request is one DoExchange call with the descriptor `COMMAND`. Each side sends one message: the frame's header as the
message's app_metadata, and its payload, if it has one, as the body of a record batch with one uint8 column of that many
rows. Later messages are not read. The sender's memory goes to gRPC as it is. The receiver's is gRPC's own buffer, into which
the pieces from the network are gathered: planes are copied once on their whole way.

Arrow reads a message whole, and decompresses it if it came compressed, before this module sees it, and pyarrow has no option
against it. A limit on message size thus refuses a message that is too large, but does not keep it out of memory: forty
kilobytes may become a gigabyte there. Certificates and tokens are checked before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hecompile.errors import InputError, WorkerError
from hecompile.extras import install_command
from hecompile.runtime.wire.framing import MAX_HEADER_BYTES, Frame, check_sizes

try:
    import pyarrow
    from pyarrow import flight
except ImportError as error:  # absent, or of a release that needs another NumPy: its text says which
    raise InputError(
        f"flight:// and flights:// need pyarrow ({error}): {install_command('network')}"
    ) from error

__all__ = ["COMMAND", "flight", "pyarrow", "read_frame", "write_frame"]

COMMAND = b"hecompile.frame.1"
_SCHEMA = pyarrow.schema([pyarrow.field("payload", pyarrow.uint8(), nullable=False)])


class _Memory:
    """Offer the memory of an Arrow buffer by NumPy's array interface, which keeps the buffer alive.

    A view of the buffer itself would be read-only, of which torch warns. It came from the network and has no other user.
    """

    def __init__(self, buffer: Any, count: int) -> None:
        self._buffer = buffer
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (count,), "data": (buffer.address, False)}


def write_frame(writer: Any, frame: Frame) -> None:
    """Send `frame` whole as one message. The payload is not copied: it must stay as it is until this returns."""
    if not len(frame.payload):
        writer.write_metadata(frame.header)
        return
    column = pyarrow.Array.from_buffers(pyarrow.uint8(), len(frame.payload), [None, pyarrow.py_buffer(frame.payload)])
    writer.begin(_SCHEMA)
    writer.write_with_metadata(pyarrow.record_batch([column], schema=_SCHEMA), frame.header)


def read_frame(reader: Any, max_bytes: int, max_header: int = MAX_HEADER_BYTES) -> Frame | None:
    """Return the next message as a frame, or None when the other side has ended the stream.

    Raises:
        WorkerError: the message is no frame, or is larger than `max_bytes`.
        FlightError, ArrowException, OSError: the other side failed, is gone, or sent what Arrow does not understand.
    """
    try:
        message = reader.read_chunk()
    except StopIteration:
        return None
    if message.app_metadata is None:
        raise WorkerError("malformed message: it has no header")
    payload = memoryview(b"") if message.data is None else _payload(message.data)
    check_sizes(message.app_metadata.size, len(payload), max_bytes, max_header)
    return Frame(message.app_metadata.to_pybytes(), payload)


def _payload(batch: Any) -> memoryview:
    """Return the rows of the only column, sharing the batch's memory. No count in the batch is trusted."""
    if batch.num_columns != 1 or batch.schema.field(0).type != pyarrow.uint8():
        raise WorkerError("malformed message: the record batch is not one uint8 column")
    column, rows = batch.column(0), batch.num_rows
    if rows == 0:
        return memoryview(b"")
    values = column.buffers()[1]
    if column.null_count or column.offset or len(column) != rows or values is None or values.size < rows:
        raise WorkerError("malformed message: the uint8 column has gaps")
    return np.asarray(_Memory(values, rows)).data
