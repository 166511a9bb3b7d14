"""Reach SEAL through TenSEAL, and the words inside its objects.

The bindings show no words, so they are read from SEAL's serialized form (SEAL 4.1, native/src/seal/serialization.h): a
header of 16 bytes (its byte 5 the compression, its bytes 8 to 15 the size), then, compressed with zstd, fields and at the
end the coefficients, uint64 [size, moduli, ring_dim]. Saving goes to an anonymous file in memory, never to a disk.
"""

from __future__ import annotations

import os
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hecompile.errors import InputError
from hecompile.extras import install_command

_HEADER = struct.Struct("<HBBBBHQ")
_MAGIC, _NONE, _ZSTD = 0xA15E, 0, 2
_SCALE_OFFSET = 32 + 1 + 8 + 8 + 8
"""Bytes before the scale, a double, in a ciphertext's fields: parms_id, is_ntt_form, size, ring_dim, moduli."""


def seal() -> Any:
    """Return the module `tenseal.sealapi`.

    Raises:
        InputError: it is not installed.
    """
    try:
        from tenseal import sealapi
    except ImportError:
        raise InputError(f"CKKS needs TenSEAL, which is not installed: {install_command('ckks')}") from None
    return sealapi


def _zstd() -> Any:
    try:
        import zstandard
    except ImportError:
        raise InputError(f"CKKS needs zstandard, which is not installed: {install_command('ckks')}") from None
    return zstandard


class MemoryFile:
    """Keep an anonymous file in memory, with a path of this process alone, for the bindings to read and write."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("hecompile", os.MFD_CLOEXEC)

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self._descriptor}"

    def read(self) -> bytes:
        size = os.fstat(self._descriptor).st_size
        return os.pread(self._descriptor, size, 0)

    def write(self, *parts: bytes | memoryview) -> None:
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        for part in parts:
            view = memoryview(part)
            while len(view):
                view = view[os.write(self._descriptor, view) :]

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> MemoryFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fields_and_words(ciphertext: Any, file: MemoryFile, shape: tuple[int, ...]) -> tuple[bytes, NDArray[np.uint32]]:
    """Read SEAL's version (2 bytes) with its fields before the coefficients, uncompressed, and those: uint32 `shape`.

    Raises:
        InputError: this SEAL writes another form.
    """
    ciphertext.save(file.path)
    raw = file.read()
    magic, header_bytes, *version, compression, _, size = _HEADER.unpack_from(raw)
    if magic != _MAGIC or size != len(raw) or compression not in (_NONE, _ZSTD):
        raise InputError(f"this SEAL writes ciphertexts in an unknown form: {install_command('ckks')}")
    count = int(np.prod(shape))
    body = raw[header_bytes:]
    if compression == _ZSTD:
        body = _zstd().ZstdDecompressor().decompressobj().decompress(body)
    words = np.frombuffer(body, dtype="<u8", count=count, offset=len(body) - 8 * count)
    return bytes(version) + body[: len(body) - 8 * count], words.astype(np.uint32).reshape(shape)


def load_words(ciphertext: Any, context: Any, file: MemoryFile, fields: bytes, scale: float, words: NDArray[Any]) -> None:
    """Fill a ciphertext with words, given the fields of another of its level; SEAL checks that the words are in range."""
    data = np.ascontiguousarray(words, dtype="<u8")
    version, fields = fields[:2], fields[2:]
    changed = fields[:_SCALE_OFFSET] + struct.pack("<d", scale) + fields[_SCALE_OFFSET + 8 :]
    size = _HEADER.size + len(changed) + data.nbytes
    file.write(_HEADER.pack(_MAGIC, _HEADER.size, *version, _NONE, 0, size), changed, data.reshape(-1).view(np.uint8).data)
    ciphertext.load(context, file.path)
