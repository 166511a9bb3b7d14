"""Add encrypted vectors so that their sum opens with the sum of the keys, and with nothing less.

    keygen    s_k ← χ^(rank·d), e_k ← χ^N             for client k and one round, never again; χ a discrete Gaussian
    encrypt   b_k = ⟨A, s_k⟩ + e_k + x_k mod q         A ∈ R_q^(rows × rank) from the public seed of the round
    add       Σ_k b_k                                  the server; b_k travels without its lowest byte
    open      Σ_k b_k - ⟨A, Σ_k s_k⟩ = Σ_k (x_k + e_k + rounding)

This is Regev's encryption with a shared A and a fresh key per message (`scheme.py`), whose keys add as its ciphertexts do:
the form of LERNA (Li et al., 2023) and Willow (Bell-Clark et al., ePrint 2024/936). How the sum of the keys comes out
without any single key is the business of `runtime/federation`. `parameters.py` has the bounds on noise and overflow.

**What opening reveals.** Besides Σ x_k it reveals S = Σ s_k and, as the sum of plaintexts is then known, E = Σ e_k. With two
honest clients the second one's message is A·S + E + x_1 + x_2 - b_1, so all rests on the first one's, an LWE sample given
the hints s_1 + s_2 and e_1 + e_2 (ternary secrets would not do: a sum of ±2 gives both away). For discrete Gaussian
secrets and errors of width σ this is Hint-MLWE with one hint and M = I, which is as hard as LWE of width σ_0 with
1/σ_0² = 2·(1/σ² + 1/σ²), i.e. σ_0 = σ/2, where σ_0 ≥ √2·η_ε(Z^N) (Kim, Lee, Seo, Song, CRYPTO 2023, theorem 1; here
√2·η = 3.10, as a standard deviation, at ε = 2^-100 and N = 2^36). So keys and errors are sums of four samples of width
SIGMA: σ = 2·SIGMA, σ_0 = SIGMA, and hardness is read from the project's table at SIGMA, less log2(clients) bits for
replacing the honest messages one after the other. The table's entries are for ternary secrets, which are smaller than
these and no harder.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hecompile.errors import FederationError, InputError, SecurityError
from hecompile.he.aggregation.masks import masks
from hecompile.he.aggregation.parameters import SAMPLES, AggregationParameters
from hecompile.he.kernels.transform import transform_secrets
from hecompile.he.random.sampling import SIGMA, PublicSeed, SecretRandom, Unsharable

_NORM_FACTOR = 1.5
"""Most times its expected length that an honest sum of keys has, but for a probability below 2^-400."""

Use = Literal["encrypt", "share"]


class AggregationKey(Unsharable):
    """Hold the key s of one client for one round: it encrypts once and is shared out once, and cannot be had otherwise.

    Two ciphertexts under one key and the same A reveal the difference of their plaintexts. So the value leaves the object
    once for each use and is gone after both. Copies, pickles and forks are refused.
    """

    __slots__ = ("_lock", "_process", "_unused", "_value")

    def __init__(self, random: SecretRandom, params: AggregationParameters) -> None:
        if type(random) is not SecretRandom:
            raise SecurityError("a key is drawn from SecretRandom, never from a public seed or stream")
        ring = params.ring
        self._value: NDArray[np.int32] | None = _small(random, ring.lattice_dim).reshape(ring.rank, ring.ring_dim)
        self._unused: set[Use] = {"encrypt", "share"}
        self._process = os.getpid()
        self._lock = threading.Lock()

    def spend(self, use: Use) -> NDArray[np.int32]:
        """Hand the value out for one use: int32 `[rank, ring_dim]`.

        Raises:
            SecurityError: it served that use before, or this process is a fork of the one that drew it.
        """
        with self._lock:
            if os.getpid() != self._process:
                raise SecurityError("this key belongs to the parent process: draw a fresh one")
            if use not in self._unused or self._value is None:
                raise SecurityError(f"this key was already used to {use}: draw a fresh one for every round")
            self._unused.discard(use)
            value = self._value
            if not self._unused:
                self._value = None
            return value


@dataclass(frozen=True, eq=False)
class EncryptedVector:
    """Hold what the server gets: the top bytes of b, little endian, uint8 `[count, upload_bytes]`."""

    words: NDArray[np.uint8]

    @property
    def count(self) -> int:
        """Return the number of coordinates."""
        return len(self.words)

    def to_bytes(self) -> bytes:
        """Return count · upload_bytes bytes."""
        return self.words.tobytes()

    @staticmethod
    def from_bytes(params: AggregationParameters, data: bytes, count: int) -> EncryptedVector:
        """Read what `to_bytes` wrote.

        Raises:
            FederationError: `data` is not `count` words long.
        """
        if len(data) != count * params.upload_bytes:
            raise FederationError(
                f"an encrypted update of {count} coordinates has {count * params.upload_bytes} bytes, got {len(data)}: was "
                "it made for another adapter or mask?"
            )
        return EncryptedVector(np.frombuffer(data, dtype=np.uint8).reshape(count, params.upload_bytes))


def keygen(params: AggregationParameters) -> AggregationKey:
    """Draw a fresh key."""
    return AggregationKey(SecretRandom(), params)


def encrypt(
    params: AggregationParameters, seed: PublicSeed, key: AggregationKey, x: NDArray[np.int32]
) -> EncryptedVector:
    """Encrypt integers `[n]`, |x| ≤ integer_bound, under the matrix of `seed`, and spend the key for this use.

    Raises:
        InputError: x is of another type or beyond the bound.
        SecurityError: the key encrypted before, or is none; `seed` is not a public seed.
    """
    if type(key) is not AggregationKey or type(seed) is not PublicSeed:
        raise SecurityError("encrypt takes a PublicSeed and an AggregationKey made by keygen, and nothing else")
    if x.dtype != np.int32 or x.ndim != 1 or x.size == 0:
        raise InputError(f"the plaintext must be int32 [n], got {x.dtype} {list(x.shape)}")
    largest = max(-int(x.min()), int(x.max()))
    if largest > params.integer_bound:
        raise InputError(
            f"a coordinate of {largest} is beyond the bound {params.integer_bound} and the sum could overflow"
        )
    return _encrypt_with(params, seed, key.spend("encrypt"), _small(SecretRandom(), x.size), x)


def _encrypt_with(
    params: AggregationParameters,
    seed: PublicSeed,
    key: NDArray[np.int32],
    error: NDArray[np.int32],
    x: NDArray[np.int32],
) -> EncryptedVector:
    """Encrypt deterministically: key int32 `[rank, ring_dim]`, error and x int32 `[n]`."""
    b = masks(params.ring, seed.stream("aggregation"), transform_secrets(key, params.ring), x.size)  # int32 [n], wraps mod q
    b += error
    b += x
    if params.step > 1:
        b += np.int32(params.step // 2)
    wire = b.view(np.uint8).reshape(-1, 4)[:, 4 - params.upload_bytes :]  # rounding to nearest, ties up
    return EncryptedVector(np.ascontiguousarray(wire))


class EncryptedSum:
    """Hold Σ b_k, grown one ciphertext at a time; the server's memory is one word per coordinate."""

    def __init__(self, params: AggregationParameters, count: int) -> None:
        self.params = params
        self.clients = 0
        self._words = np.zeros(count, dtype=np.uint32)

    def add(self, vector: EncryptedVector) -> None:
        """Add one ciphertext.

        Raises:
            FederationError: another length, or more clients than the parameters were made for.
        """
        if vector.words.shape != (self._words.size, self.params.upload_bytes):
            raise FederationError(f"a ciphertext of {vector.count} coordinates in a sum of {self._words.size}")
        if self.clients == self.params.max_clients:
            raise FederationError(f"the sum could overflow beyond {self.params.max_clients} clients")
        words = np.zeros((self._words.size, 4), dtype=np.uint8)
        words[:, 4 - self.params.upload_bytes :] = vector.words
        self._words += words.view("<u4")[:, 0]
        self.clients += 1

    def to_bytes(self) -> bytes:
        """Return the words of the sum so far, 4 bytes each, little endian."""
        return self._words.astype("<u4").tobytes()

    @staticmethod
    def from_bytes(params: AggregationParameters, data: bytes, count: int, clients: int) -> EncryptedSum:
        """Read what `to_bytes` wrote of a sum over `clients`.

        Raises:
            FederationError: `data` is not `count` words long, or more clients than the parameters were made for.
        """
        if len(data) != 4 * count or not 0 <= clients <= params.max_clients:
            raise FederationError(f"an encrypted sum of {count} coordinates has {4 * count} bytes, got {len(data)}")
        total = EncryptedSum(params, count)
        total.clients, total._words = clients, np.frombuffer(data, dtype="<u4").astype(np.uint32)
        return total

    def open(self, seed: PublicSeed, key_sum: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return Σ x with an error of at most `noise_bound(clients)`: int64 `[n]`.

        Args:
            seed: of the round.
            key_sum: Σ s_k over the same clients, integers `[rank, ring_dim]`.

        Raises:
            FederationError: `key_sum` is no sum of so many keys.
        """
        ring = self.params.ring
        if key_sum.shape != (ring.rank, ring.ring_dim):
            raise FederationError(f"a sum of keys is [{ring.rank}, {ring.ring_dim}], got {list(key_sum.shape)}")
        length = float(np.linalg.norm(key_sum.astype(np.float64)))
        expected = math.sqrt(self.clients * SAMPLES * ring.lattice_dim) * SIGMA
        if not ring.insecure and length > _NORM_FACTOR * expected:
            raise FederationError(
                f"what was opened is no sum of {self.clients} keys (length {length:.0f}, expected {expected:.0f}): a share "
                "was forged or belongs to another set of clients"
            )
        secret = transform_secrets(key_sum.astype(np.int32), ring)
        mask = masks(ring, seed.stream("aggregation"), secret, self._words.size)
        return (self._words - mask.view(np.uint32)).view(np.int32).astype(np.int64)


def _small(random: SecretRandom, count: int) -> NDArray[np.int32]:
    """Draw sums of SAMPLES discrete Gaussians, of width √SAMPLES · SIGMA: int32 `[count]`."""
    result = random.discrete_gaussian((count,)).astype(np.int32)
    for _ in range(SAMPLES - 1):
        result += random.discrete_gaussian((count,))
    return result
