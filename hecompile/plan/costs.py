"""Predict the cost of a step in seconds of client, worker and link, for placement and parameter selection.

With d = ring_dim, m = rank, T tokens cut into ⌈T/d⌉ blocks (the last one costs as much as a full one), and
F(d) = 2.5·log2(d/2) flops per coefficient of a complex FFT of length d/2 (5·n·log2 n for length n):

    encrypt, per input feature    blocks·d·(F(d) + 4m)               m pointwise products, one inverse transform
    A, per input feature          8·m·d bytes read                   its transforms; 1/m of it in a packed ring
    decrypt, per output feature   blocks·d·(F(d) + 4m)               as much
    hint's row                    m·d·F(d)                           its transforms: files have words
    hint, per output feature      4·m·d bytes read, at most
    worker                        2·in·out·T operations per limb product, of which L limbs need L (2L - 1 for int16 weights)
    wire                          B·T·in/8 bytes up, C·T·out/8 bytes down, for words of B and C bits
    hint from the worker          as a product of d·m tokens with 4 limbs, and 4 bytes down (plans without stored hints)

and a constant per element for what does not depend on the ring (error sampling, encoding, rounding, packing).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from hecompile.bundles.public_rows import WORD_BYTES
from hecompile.he.parameters import CATALOGUE, LOG_Q, LinearParameters, RingParameters


@dataclass(frozen=True)
class CostModel:
    """Hold the speeds of a client, a worker and the link between them. Only their ratios decide a choice.

    The defaults are those of two x86 cores with AVX-512 on each side and a link of 1 Gbit/s;
    `benchmarks/crypto/unit_costs.py` measures them.
    """

    client_flops: float = 3.0e11
    """float32 operations per second of the client's matrix products (multiply and add count as two)."""
    worker_flops: float = 1.0e12
    """int8 operations per second of the worker."""
    bandwidth: float = 1.25e8
    """bytes per second, each way."""
    transform_flops: float = 5.0e10
    """float64 operations per second of the client's ring products."""
    encrypt_seconds: float = 1.5e-9
    """client seconds per encrypted element, beside the ring product."""
    decrypt_seconds: float = 5.0e-10
    """client seconds per decrypted element, beside the ring product."""
    hint_bandwidth: float = 2.0e10
    """bytes per second that the client reads of hints, from the system's file cache, and of A."""

    def encrypt(self, ring: RingParameters, tokens: int, features: int) -> float:
        """Return client seconds to encrypt `tokens` rows of `features`, including the reading of A's transforms."""
        seconds = _product_flops(ring, tokens) / self.transform_flops + tokens * self.encrypt_seconds
        return features * (seconds + 2 * hint_bytes(ring, 1) / ring.packing / self.hint_bandwidth)

    def decrypt(self, ring: RingParameters, tokens: int, features: int) -> float:
        """Return client seconds to decrypt `tokens` rows of `features`, with the reading of the hint and its transforms."""
        flops = _product_flops(ring, tokens) + ring.lattice_dim * _transform_flops(ring)
        seconds = flops / self.transform_flops + tokens * self.decrypt_seconds
        return features * (seconds + hint_bytes(ring, 1) / self.hint_bandwidth)

    def wire(self, parameters: LinearParameters, tokens: int) -> float:
        """Return seconds on the link, both ways."""
        return (parameters.bytes_up(tokens) + parameters.bytes_down(tokens)) / self.bandwidth

    def worker(self, parameters: LinearParameters, tokens: int, weight_bytes: int = 1) -> float:
        """Return worker seconds of a product."""
        products = limb_products(parameters.upload_limbs, weight_bytes)
        return 2 * parameters.in_features * parameters.out_features * tokens * products / self.worker_flops

    def product(self, ring: RingParameters, parameters: LinearParameters, tokens: int, weight_bytes: int = 1) -> float:
        """Return seconds of one remote product, with nothing done at the same time."""
        client = self.encrypt(ring, tokens, parameters.in_features)
        client += self.decrypt(ring, tokens, parameters.out_features)
        return client + self.wire(parameters, tokens) + self.worker(parameters, tokens, weight_bytes)

    def fetched_hint(self, ring: RingParameters, parameters: LinearParameters, weight_bytes: int = 1) -> float:
        """Return seconds of worker and link for the hint that a client without stored hints requests with every product."""
        exact = dataclasses.replace(parameters, upload_bits=LOG_Q, reply_bits=LOG_Q)
        download = hint_bytes(ring, parameters.out_features) / self.bandwidth
        return self.worker(exact, ring.lattice_dim, weight_bytes) + download

    def crossing(self, features: int) -> float:
        """Return seconds per token for a value of `features` elements and its gradient to cross, one up and one down.

        Ring and bytes are not chosen yet: all bytes of each word count, and cryptography as in a full block of a middling
        ring.
        """
        ring = CATALOGUE["512x3"]
        client = self.encrypt(ring, ring.ring_dim, features) + self.decrypt(ring, ring.ring_dim, features)
        return features * 2 * WORD_BYTES / self.bandwidth + client / ring.ring_dim

    def remote(self, multiplications: int) -> float:
        """Return worker seconds per token of a linear, forward and backward, with all limbs."""
        return 4 * multiplications * WORD_BYTES / self.worker_flops

    def local(self, multiplications: int) -> float:
        """Return client seconds per token of a linear that the client computes itself, forward and backward."""
        return 4 * multiplications / self.client_flops

    def prefers_remote_head(self, vocabulary: int, hidden: int) -> bool:
        """Return whether a scored token is done sooner where the worker multiplies by the output head [V, H]."""
        weights = vocabulary * hidden
        away = self.crossing(hidden) + self.crossing(vocabulary) + self.remote(weights)
        return away < self.local(weights)


def limb_products(upload_limbs: int, weight_bytes: int) -> int:
    """Count the integer matrix products of a circuit: limb l times weight byte k matters mod 2^(8L) only for l + k < L."""
    return sum(upload_limbs - k for k in range(min(weight_bytes, upload_limbs)))


def hint_bytes(ring: RingParameters, rows: int, bits: int = 8 * WORD_BYTES) -> int:
    """Return the bytes of the hint of a circuit with `rows` output features and words of that many bits."""
    return ring.lattice_dim * rows * bits // 8


def _transform_flops(ring: RingParameters) -> float:
    """Return F(d): flops per coefficient of one transform."""
    return 2.5 * math.log2(ring.ring_dim / 2)


def _product_flops(ring: RingParameters, tokens: int) -> float:
    """Return the flops of ⟨A_j, s⟩ for one row j and every block of `tokens` tokens."""
    blocks = math.ceil(tokens / ring.ring_dim)
    return blocks * ring.ring_dim * (_transform_flops(ring) + 4 * ring.rank)
