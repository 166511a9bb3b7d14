"""What a step costs, in seconds by who spends them: the one model that placement and parameter selection decide by.

With d = ring_dim, m = rank, T tokens cut into ⌈T/d⌉ blocks (the last one costs as much as a full one), and
F(d) = 2.5·log2(d/2) flops per coefficient of a complex FFT of length d/2 (5·n·log2 n for length n):

    encrypt, per input feature    blocks·d·(F(d) + 4m)               m pointwise products, one inverse transform
    A, per input feature          8·m·d bytes read                   its transforms; 1/m of it in a packed ring
    decrypt, per output feature   blocks·d·(F(d) + 4m)               as much
    hint's row as words           m·d·F(d)                           its transforms, where the file does not have them
    hint, per output feature      4·m·d bytes read
    worker                        2·in·out·T operations per limb product, of which L limbs need L (2L - 1 for int16 weights)
    wire                          L·T·in bytes up, R·T·out bytes down
    hint from the worker          as a product of d·m tokens with 4 limbs, and 4 bytes down (plans without stored hints)

and a constant per element for what does not depend on the ring (error sampling, encoding, rounding, packing).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from hecompile.he.parameters import CATALOGUE, LinearParameters, RingParameters

WORD_BYTES = 4


@dataclass(frozen=True)
class CostModel:
    """Speeds of a client, a worker and the link between them. Only ratios matter for what is chosen.

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
        """Client seconds to encrypt `tokens` rows of `features`, the reading of A's transforms included."""
        seconds = _product_flops(ring, tokens) / self.transform_flops + tokens * self.encrypt_seconds
        return features * (seconds + 2 * hint_bytes(ring, 1) / ring.packing / self.hint_bandwidth)

    def decrypt(self, ring: RingParameters, tokens: int, features: int, words: bool = False) -> float:
        """Client seconds to decrypt as much, reading the hint included, and its transforms where it comes as words."""
        flops = _product_flops(ring, tokens) + (ring.lattice_dim * _transform_flops(ring) if words else 0.0)
        seconds = flops / self.transform_flops + tokens * self.decrypt_seconds
        return features * (seconds + hint_bytes(ring, 1) / self.hint_bandwidth)

    def wire(self, parameters: LinearParameters, tokens: int) -> float:
        """Seconds on the link, both ways."""
        return (parameters.bytes_up(tokens) + parameters.bytes_down(tokens)) / self.bandwidth

    def worker(self, parameters: LinearParameters, tokens: int, weight_bytes: int = 1) -> float:
        """Worker seconds of a product."""
        products = limb_products(parameters.upload_limbs, weight_bytes)
        return 2 * parameters.in_features * parameters.out_features * tokens * products / self.worker_flops

    def product(self, ring: RingParameters, parameters: LinearParameters, tokens: int, weight_bytes: int = 1) -> float:
        """Seconds of one remote product, everything one after the other."""
        words = parameters.decryption_precision is np.float64
        client = self.encrypt(ring, tokens, parameters.in_features)
        client += self.decrypt(ring, tokens, parameters.out_features, words)
        return client + self.wire(parameters, tokens) + self.worker(parameters, tokens, weight_bytes)

    def fetched_hint(self, ring: RingParameters, parameters: LinearParameters, weight_bytes: int = 1) -> float:
        """Worker and wire seconds of the hint that a client without stored ones asks for with every product."""
        exact = dataclasses.replace(parameters, upload_limbs=WORD_BYTES, reply_bytes=WORD_BYTES)
        download = hint_bytes(ring, parameters.out_features) / self.bandwidth
        return self.worker(exact, ring.lattice_dim, weight_bytes) + download

    def crossing(self, features: int) -> float:
        """Seconds per token, before ring and bytes are chosen, for a value of `features` elements to go up and its gradient
        to come down, or the reverse: all bytes of each word, cryptography as in a full block of a middling ring."""
        ring = CATALOGUE["512x3"]
        client = self.encrypt(ring, ring.ring_dim, features) + self.decrypt(ring, ring.ring_dim, features)
        return features * 2 * WORD_BYTES / self.bandwidth + client / ring.ring_dim

    def remote(self, multiplications: int) -> float:
        """Worker seconds per token of a linear, forward and backward, with all limbs."""
        return 4 * multiplications * WORD_BYTES / self.worker_flops

    def local(self, multiplications: int) -> float:
        """Client seconds per token of a linear that the client computes itself, forward and backward."""
        return 4 * multiplications / self.client_flops


def limb_products(upload_limbs: int, weight_bytes: int) -> int:
    """Integer matrix products of a circuit: limb l times weight byte k counts mod 2^(8L), so only l + k < L is needed."""
    return sum(upload_limbs - k for k in range(min(weight_bytes, upload_limbs)))


def hint_bytes(ring: RingParameters, rows: int) -> int:
    """Bytes of the hint of a circuit with `rows` output features."""
    return WORD_BYTES * ring.lattice_dim * rows


def _transform_flops(ring: RingParameters) -> float:
    """F(d): flops per coefficient of one transform."""
    return 2.5 * math.log2(ring.ring_dim / 2)


def _product_flops(ring: RingParameters, tokens: int) -> float:
    """Flops of ⟨A_j, s⟩ for one row j and every block of `tokens` tokens."""
    blocks = math.ceil(tokens / ring.ring_dim)
    return blocks * ring.ring_dim * (_transform_flops(ring) + 4 * ring.rank)
