"""Draw all randomness of hecompile: public streams from a seed, secrets from the operating system, never mixed.

The two are different types, and every function that takes one checks which it was given. Public values (the matrix A) may
be reproduced by anyone who has the seed. Secret values (ternary secrets, errors) come from `os.urandom`, or from the
keystream of AES-256 in counter mode under a key that `os.urandom` made for one call. They cannot be reproduced, not even
for a test: tests use the deterministic functions below these types instead.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256, ChaCha20
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from numpy.typing import NDArray

from hecompile.errors import InputError, SecurityError
from hecompile.he.kernels.jit import compiled
from hecompile.he.kernels.scratch import scratch
from hecompile.he.random.gaussian import ERROR_BOUND, SIGMA, gaussian_from_uniform, second_bytes, tail_bytes

__all__ = ["ERROR_BOUND", "SIGMA", "OneTimeSecret", "PublicSeed", "PublicStream", "SecretRandom", "Unsharable"]

SEED_BYTES = 32


@dataclass(frozen=True)
class PublicSeed:
    """Hold 32 public bytes from which public values are expanded. It may be printed: it is part of the bundle.

    Raises:
        InputError: the value is not 32 bytes.
    """

    value: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.value, bytes) or len(self.value) != SEED_BYTES:
            raise InputError(f"a public seed is {SEED_BYTES} bytes: draw one with PublicSeed.draw()")

    @staticmethod
    def draw() -> PublicSeed:
        """Draw a fresh seed from the operating system's generator."""
        return PublicSeed(os.urandom(SEED_BYTES))

    @staticmethod
    def from_hex(text: str) -> PublicSeed:
        """Read the seed that `hex()` wrote.

        Raises:
            InputError: the text is something else.
        """
        try:
            return PublicSeed(bytes.fromhex(text))
        except ValueError:
            raise InputError(f"a public seed is written as {2 * SEED_BYTES} hexadecimal digits") from None

    def hex(self) -> str:
        """Return 64 hexadecimal digits."""
        return self.value.hex()

    def stream(self, label: str) -> PublicStream:
        """Return the public stream named `label`; streams with different labels are independent."""
        return PublicStream(self._expand("stream", label))

    def derive(self, label: str) -> PublicSeed:
        """Derive a seed for a part that wants streams of its own."""
        return PublicSeed(self._expand("seed", label))

    def _expand(self, use: str, label: str) -> bytes:
        # HKDF-Expand (RFC 5869): the seed is uniform already, so the extract step is not needed.
        info = f"hecompile/{use}/{label}".encode()
        return HKDFExpand(algorithm=SHA256(), length=SEED_BYTES, info=info).derive(self.value)


class PublicStream:
    """Generate uniform public words: ChaCha20 with the stream's key, and one nonce per block, for access to any block."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def uint32(self, block: int, count: int) -> NDArray[np.uint32]:
        """Return the first `count` words, uint32 `[count]`, little endian, of block number `block`, 0 ≤ block < 2^64."""
        # The cipher's 16 bytes are a 64-bit little-endian counter that starts at 0 and then the 64-bit nonce.
        nonce = bytes(8) + block.to_bytes(8, "little")
        keystream = Cipher(ChaCha20(self._key, nonce), mode=None).encryptor().update(bytes(4 * count))
        return np.frombuffer(keystream, dtype="<u4")


class Unsharable:
    """Protect secret objects, as their base: they cannot be copied or serialized, and printing one shows nothing."""

    __slots__ = ()

    def _refuse(self, *_: Any) -> NoReturn:
        raise SecurityError(f"a {type(self).__name__} cannot be copied, pickled or sent to another process")

    __copy__ = __deepcopy__ = __reduce__ = __getstate__ = _refuse

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class SecretRandom(Unsharable):
    """Draw secret values from the operating system's generator. It has no state, no seed and no subclass.

    Where many bytes are wanted, they are the keystream of AES-256 in counter mode under 32 fresh bytes of the generator, a
    key that serves one call and is kept nowhere. This is the core of NIST SP 800-90A's CTR_DRBG, at twenty times the speed
    of the operating system's generator.

    Sampling is by table look-up and is not constant time: the adversary is a worker across a network, who sees neither
    the client's cache nor the time of a single sample.
    """

    __slots__ = ()

    def __init_subclass__(cls, **_: Any) -> None:
        raise SecurityError("SecretRandom cannot be subclassed: secret values come from the operating system only")

    def ternary(self, count: int) -> NDArray[np.int8]:
        """Draw independent uniform values of {-1, 0, 1}: int8 `[count]`; of two bits each, the fourth case is rejected."""
        samples, filled = np.empty(count, dtype=np.int8), 0
        while filled < count:
            # 4 samples per byte, of which 3 survive on average; 32 spare bytes make a second round rare.
            raw = np.frombuffer(os.urandom((count - filled) // 3 + 32), dtype=np.uint8)
            filled = _ternary_from_bits(raw, samples, filled)
        return samples

    def below_power_of_two(self, bits: int, count: int) -> NDArray[np.int64]:
        """Draw independent uniform integers in [0, 2^bits), bits ≤ 8: int64 `[count]`.

        Raises:
            SecurityError: more bits, which a byte does not have: all would be 0.
        """
        if not 0 <= bits <= 8:
            raise SecurityError(f"integers of 0 to 8 bits are drawn, not of {bits}")
        return (np.frombuffer(os.urandom(count), dtype=np.uint8) >> (8 - bits)).astype(np.int64)

    def below(self, bound: int, count: int) -> NDArray[np.int64]:
        """Draw independent uniform integers in [0, bound), 1 ≤ bound ≤ 2^16: int64 `[count]`.

        Each takes 16 bits; values from the largest multiple of `bound` on are rejected.
        """
        kept: list[NDArray[np.int64]] = []
        missing, limit = count, (1 << 16) // bound * bound
        while missing > 0:
            raw = _Keystream().take(2 * (missing + 32)).view("<u2")
            values = raw[raw < limit].astype(np.int64) % bound
            kept.append(values[:missing])
            missing -= len(kept[-1])
        return np.concatenate(kept) if kept else np.zeros(0, dtype=np.int64)

    def uniform_bytes(self, count: int) -> NDArray[np.uint8]:
        """Draw independent uniform bytes: uint8 `[count]`."""
        result = np.empty(count, dtype=np.uint8)
        keystream = _Keystream()
        for start in range(0, count, _PIECE):
            piece = result[start : start + _PIECE]
            piece[:] = keystream.take(piece.size)
        return result

    def discrete_gaussian(self, shape: tuple[int, ...], out: NDArray[np.int8] | None = None) -> NDArray[np.int8]:
        """Draw independent centred discrete Gaussian samples, standard deviation SIGMA, |e| ≤ ERROR_BOUND: int8 `shape`.

        `out`, int8 and flat with as many elements, is filled and returned in that shape.
        """
        count = math.prod(shape)
        samples = np.empty(count, dtype=np.int8) if out is None else out
        if count <= _FROM_SYSTEM:
            drawn = _system_bytes(count + second_bytes(count))
            return gaussian_from_uniform(drawn[:count], drawn[count:], _system_bytes, samples).reshape(shape)
        keystream = _Keystream()
        for start in range(0, count, _PIECE):
            _draw_gaussian(keystream, samples[start : min(start + _PIECE, count)])
        return samples.reshape(shape)


_FROM_SYSTEM = 1 << 10
"""Most samples whose random bits the operating system draws sooner than a cipher is set up."""
_PIECE = 1 << 20
"""Samples drawn at a time."""
_CIPHER_MARGIN = 15
"""Bytes of room that the cipher needs beyond those that it writes."""
_ZEROS = bytes((1 << 20) + (1 << 18))
"""Plaintext of the keystream, as long as a piece of samples wants: the cipher releases Python's lock while it works, and
then waits for it."""


class _Keystream(Unsharable):
    """Generate secret bytes: AES-256 in counter mode under a key drawn here."""

    __slots__ = ("_encryptor",)

    def __init__(self) -> None:
        # GCM encrypts in counter mode; its tag is never used. OpenSSL has vector AES for it and not for plain CTR.
        self._encryptor = Cipher(AES256(os.urandom(32)), mode=GCM(bytes(12))).encryptor()

    def fill(self, target: NDArray[np.uint8]) -> None:
        """Overwrite all but the last _CIPHER_MARGIN bytes of `target` with fresh uniform bytes."""
        zeros, into = memoryview(_ZEROS), target.data
        end = target.size - _CIPHER_MARGIN
        for start in range(0, end, len(_ZEROS)):
            size = min(len(_ZEROS), end - start)
            written = self._encryptor.update_into(zeros[:size], into[start:])
            if written != size:  # what was there before would pass for fresh randomness
                raise SecurityError(f"the cipher wrote {written} of {size} random bytes: reinstall `cryptography`")

    def take(self, count: int) -> NDArray[np.uint8]:
        """Return fresh uniform bytes: uint8 `[count]`."""
        target = np.empty(count + _CIPHER_MARGIN, dtype=np.uint8)
        self.fill(target)
        return target[:count]


def _system_bytes(count: int) -> NDArray[np.uint8]:
    """Draw uniform bytes of the operating system's generator: uint8 `[count]`."""
    return np.frombuffer(bytearray(os.urandom(count)), dtype=np.uint8)  # writable: kernels are compiled for such arrays


def _draw_gaussian(keystream: _Keystream, samples: NDArray[np.int8]) -> None:
    """Fill `samples`. All bytes that are likely to be wanted are drawn at once, as threads wait for Python's lock."""
    count = samples.size
    known = count + second_bytes(count)
    uniform = scratch("keystream", known + tail_bytes(count) + _CIPHER_MARGIN, np.uint8)
    keystream.fill(uniform)
    spare = [uniform[known:-_CIPHER_MARGIN]]

    def more_bytes(wanted: int) -> NDArray[np.uint8]:
        tail = spare.pop()  # once: no byte serves two samples
        return tail[:wanted] if wanted <= tail.size else keystream.take(wanted)

    gaussian_from_uniform(uniform[:count], uniform[count:known], more_bytes, samples)


@compiled
def _ternary_from_bits(raw, samples, filled):  # type: ignore[no-untyped-def]
    """Fill `samples` from place `filled` on with pairs of bits, less 1, that are not 3; return how many it then has."""
    for byte in raw:
        for shift in (0, 2, 4, 6):
            pair = (byte >> shift) & 3
            if filled < samples.size:
                samples[filled] = np.int8(pair) - np.int8(1)
                filled += pair != 3
    return filled


class OneTimeSecret(Unsharable):
    """Hold a ternary secret s ∈ R^rank, int8 `[rank, ring_dim]`, that exactly one encryption may consume.

    Two encryptions under one secret and the same A reveal the difference of their plaintexts. So the value leaves this
    object once, and no copy of the object can be made, by copy, pickle or a forked process.
    """

    __slots__ = ("_lock", "_process", "_value")

    def __init__(self, random: SecretRandom, rank: int, ring_dim: int) -> None:
        if type(random) is not SecretRandom:
            raise SecurityError("a secret is drawn from SecretRandom, never from a public seed or stream")
        self._value: NDArray[np.int8] | None = random.ternary(rank * ring_dim).reshape(rank, ring_dim)
        self._process = os.getpid()
        self._lock = threading.Lock()

    def spend(self) -> NDArray[np.int8]:
        """Hand the value out, once: int8 `[rank, ring_dim]`.

        Raises:
            SecurityError: it was spent before, or this process is a fork of the one that drew it.
        """
        with self._lock:
            if os.getpid() != self._process:
                raise SecurityError("this one-time secret belongs to the parent process: draw a fresh one with keygen")
            value, self._value = self._value, None
        if value is None:
            raise SecurityError("this one-time secret was already used: draw a fresh one with keygen per encryption")
        return value
