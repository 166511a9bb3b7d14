"""Read the head of a GGUF file, every length of it bounded by the file's own before anything is made of it.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian:

    "GGUF" u32 version  u64 tensors  u64 pairs
    pairs:   string key  u32 type  value           a string is u64 length and bytes; an array u32 type, u64 count, elements
    tensors: string name  u32 dimensions  u64 each  u32 type  u64 offset from the data, which begins at the next alignment
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hecompile.errors import InputError

Value = int | float | bool | str
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values that are single numbers, as `struct` names them."""
_STRING, _ARRAY = 8, 9
_MOST_PAIRS, _MOST_TENSORS, _MOST_DIMENSIONS = 1 << 14, 1 << 17, 4
_MOST_NAME, _MOST_ELEMENTS, _MOST_SIZE = 1 << 10, 1 << 20, 1 << 40
_DEFAULT_ALIGNMENT, _MOST_ALIGNMENT = 32, 1 << 16


@dataclass(frozen=True)
class TensorEntry:
    """Describe a tensor as the file has it.

    Attributes:
        shape: slowest dimension first, as torch has it.
        kind: number of ggml's type.
        start: byte of the file that it begins at.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class GgufHeader:
    """Hold the head of a file.

    Attributes:
        values: pairs with one value, by key.
        counts: how many elements each array has, by key.
        size: bytes of the file.
    """

    path: Path
    values: dict[str, Value]
    counts: dict[str, int]
    tensors: tuple[TensorEntry, ...]
    size: int

    @classmethod
    def read(cls, path: Path) -> GgufHeader:
        """Read the head of a file. Raises InputError naming what is wrong; nothing larger than the head is read."""
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(path, content).header()
        except (OSError, ValueError) as error:  # of an empty file, too
            raise InputError(f"{path} cannot be read as a GGUF file: {error}") from None


class _Reader:
    """Walk through a head; every step checks that what it takes lies in the file."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._at = path, content, 0

    def header(self) -> GgufHeader:
        if self._bytes(4) != _MAGIC:
            raise self._error("it does not begin with GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            raise self._error(
                f"version {version} is not read; supported: {', '.join(map(str, _VERSIONS))}, little-endian"
            )
        tensor_count, pair_count = self._count("Q", _MOST_TENSORS, "tensors"), self._count("Q", _MOST_PAIRS, "keys")
        values: dict[str, Value] = {}
        counts: dict[str, int] = {}
        for _ in range(pair_count):
            key = self._name()
            if key in values or key in counts:
                raise self._error(f"the key {key} is there twice")
            kind = self._number("I")
            if kind == _ARRAY:
                counts[key] = self._skip_array(key)
            else:
                values[key] = self._value(key, kind)
        entries = [self._tensor() for _ in range(tensor_count)]
        return GgufHeader(self._path, values, counts, self._placed(entries, values), len(self._content))

    def _placed(self, entries: list[TensorEntry], values: dict[str, Value]) -> tuple[TensorEntry, ...]:
        """Return the tensors with their offsets counted from the file's beginning."""
        alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            raise self._error(
                f"general.alignment must be a power of two up to {_MOST_ALIGNMENT}, got {alignment!r:.40}"
            )
        data = -(-self._at // alignment) * alignment
        placed = []
        for entry in entries:
            if entry.start % alignment:
                raise self._error(f"tensor {entry.name} is not aligned")
            placed.append(TensorEntry(entry.name, entry.shape, entry.kind, data + entry.start))
        if len({entry.name for entry in placed}) < len(placed):
            raise self._error("two tensors have one name")
        return tuple(placed)

    def _tensor(self) -> TensorEntry:
        name = self._name()
        dimensions = self._count("I", _MOST_DIMENSIONS, f"dimensions in tensor {name}")
        shape = tuple(self._count("Q", _MOST_SIZE, f"rows or columns in tensor {name}") for _ in range(dimensions))
        kind, start = self._number("I"), self._number("Q")
        if start > len(self._content):
            raise self._error(f"tensor {name} begins after the file's end: it is not complete")
        return TensorEntry(name, shape[::-1], kind, start)

    def _value(self, key: str, kind: int) -> Value:
        if kind in _NUMBERS:
            number: int | float | bool = self._number(_NUMBERS[kind])
            return number
        if kind == _STRING:
            return self._text(self._number("Q"))
        raise self._error(f"the key {key} has values of type {kind}, which GGUF has not")

    def _skip_array(self, key: str) -> int:
        kind, count = self._number("I"), self._count("Q", _MOST_ELEMENTS, f"elements in {key}")
        if kind in _NUMBERS:
            self._bytes(count * struct.calcsize(_NUMBERS[kind]))
            return count
        if kind != _STRING:
            raise self._error(f"the key {key} has an array of type {kind}, which is not read")
        for _ in range(count):
            self._skip(self._number("Q"))
        return count

    def _name(self) -> str:
        return self._text(self._count("Q", _MOST_NAME, "bytes in a name"))

    def _text(self, length: int) -> str:
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self._error(f"the text before byte {self._at} is not UTF-8") from None

    def _count(self, format_: str, most: int, what: str) -> int:
        count = self._number(format_)
        if count > most:
            raise self._error(f"it has {count} {what}, more than {most}")
        return int(count)

    def _number(self, format_: str) -> Any:
        (value,) = struct.unpack("<" + format_, self._bytes(struct.calcsize(format_)))
        return value

    def _bytes(self, length: int) -> bytes:
        start = self._at
        self._skip(length)
        return self._content[start : self._at]

    def _skip(self, length: int) -> None:
        if length > len(self._content) - self._at:
            raise self._error(f"it ends before byte {self._at + length}, where its head goes on: it is not complete")
        self._at += length

    def _error(self, reason: str) -> InputError:
        return InputError(f"{self._path} cannot be read as a GGUF file: {reason}")
