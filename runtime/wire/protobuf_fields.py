"""Read and write the fields of protobuf messages without copying them, where a library would copy megabytes twice.

Source: the encoding in the documentation of Protocol Buffers. Only what is here is understood: groups are refused, as no
message of this program's protocols has one.
"""

from __future__ import annotations

from collections.abc import Iterator

LENGTH_DELIMITED = 2
"""The wire type of bytes, text and messages."""

FIXED_BYTES = {1: 8, 5: 4}
"""Bytes of a value, by the wire types that have a fixed size."""

Value = int | memoryview


class MalformedMessageError(ValueError):
    """Say that bytes of somebody else are no protobuf message."""

    def __init__(self) -> None:
        super().__init__("it is no message of this protocol")


def fields(content: memoryview, most: int) -> Iterator[tuple[int, Value]]:
    """Yield (number, value) of each field in its order: an int of a varint, else the part of `content` that holds the value.

    Raises:
        ValueError: it is no message, or one of more than `most` fields.
    """
    place = 0
    for _ in range(most):
        if place == len(content):
            return
        tag, place = read_varint(content, place)
        kind = tag & 7
        if kind == 0:
            value, place = read_varint(content, place)
            yield tag >> 3, value
            continue
        size = FIXED_BYTES.get(kind)
        if kind == LENGTH_DELIMITED:
            size, place = read_varint(content, place)
        if size is None or size > len(content) - place:
            raise MalformedMessageError
        yield tag >> 3, content[place : place + size]
        place += size
    if place < len(content):
        raise ValueError("it is larger than any message of this protocol")


def read_varint(content: bytes | memoryview, place: int) -> tuple[int, int]:
    """Return an integer as protobuf encodes it, and the place after it. Raises ValueError where it does not end."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(content):
            break
        value |= (content[place] & 0x7F) << shift
        place += 1
        if content[place - 1] < 0x80:
            return value, place
    raise MalformedMessageError


def varint(value: int) -> bytes:
    """Encode an integer as protobuf does: seven bits per byte, lowest first, the eighth set on all but the last."""
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def prefix(number: int, size: int) -> bytes:
    """Return what stands before the `size` bytes of a length-delimited field."""
    return varint(number << 3 | LENGTH_DELIMITED) + varint(size)


def field(number: int, value: bytes) -> bytes:
    """Encode a length-delimited field; nothing where the value is empty, as protobuf does."""
    return prefix(number, len(value)) + value if value else b""
