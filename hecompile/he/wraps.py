"""See over the integers what a check mod q cannot: products that left ±q/2 and came back as something else.

A token may be scaled beyond what is proven not to overflow (`LinearParameters.gain`). Then an output may be an integer V_i
with |V_i| ≥ q/2, and what is decrypted is Y_i = V_i - k_i·q, off by a multiple of the modulus. Verification is mod q and
cannot see that. So the client keeps secret vectors r, factors uniform in ±{1, ..., A}, with v = rᵀ·W, and looks at

    D = Σ_i r_i·Y_i - Σ_j v_j·x_j = N - q·m,   m = Σ_i r_i·k_i,   N = v·(e + ρ + ε) + Σ_i r_i·(ρ'_i - δ_i)

over the reals (Freivalds, IFIP 1977, there over a field). e, ρ, ρ' and δ are those of `LinearParameters.room`, ε is the
rounding of x. A token counts as wrapped where |D| > q/2 for one of the vectors.

**Missed.** r does not depend on data, and until a wrap is missed nothing that is sent or computed depends on r. Let k ≠ 0 be
any pattern of wraps, with k_i ≠ 0. Given the other factors, m = 0 for one value of r_i at most, so with probability 1/(2A).
Vectors are drawn again where ‖v‖² > 2·E‖v‖², which has probability 1/2 at most (Markov), so that this at most doubles. So
`vector_count` independent vectors miss a pattern with probability 2^-MISSED_BITS at most. A single output that wraps is
never missed: |m| is then 1 at least.

**Alarms.** Where nothing wraps, m = 0, and |N| > q/2 is an alarm without cause. A is the largest of LARGEST_FACTORS with
which 8 standard deviations of N, for the longest v that is kept, and what a worker can add stay within q/2.

**What a worker can add.** Verification goes first. An error of Euclidean norm L moves its sums by √2.5·L in the mean, up to
the tolerance t, and D by L·√E[r²]. Room is kept for 4 times √E[r²]·t/√2.5: an error that reaches q/2 is as a rule several
times as long as what passes with even odds, so that whoever tries is caught. An error below the tolerance
decides only where a V_i is within 2·t of ±q/2: `boundary_share` says how near that is. What `verification` lets pass by luck
can be larger: several results or tokens that are wrong together. Where it moves D by q/2 it is an alarm whatever the data
(one result of two tokens off by q/2 passes with probability 0.29 at most, and is one), else it decides where a V_i is within
it of ±q/2.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.array_files import read_npy
from hecompile.errors import InputError, SecurityError
from hecompile.files import opened_whole, unreadable
from hecompile.he.check_vectors import GROUP, check_count, largest_tolerance
from hecompile.he.parameters import LOG_Q, LinearParameters
from hecompile.he.random.sampling import SecretRandom, Unsharable
from hecompile.he.weight_norms import WeightNorms

MISSED_BITS = 40
"""A pattern of wraps is missed with probability 2^-40 at most."""
LARGEST_FACTORS = (64, 32, 16, 8, 4)
"""Sizes A that factors are drawn up to: the larger they are, the fewer vectors it takes, and the more they add up noise."""

_HALF = 2.0 ** (LOG_Q - 1)
_DEVIATIONS = 8
_LONGER = 2.0
"""How many times its mean ‖v‖² may be."""
_OF_WORKER = 4.0


def largest_factor(linear: LinearParameters, norms: WeightNorms) -> int | None:
    """Return A, up to which the factors of a circuit's vectors are drawn; None where noise would hide every wrap.

    Args:
        linear: the circuit.
        norms: of its matrix.
    """
    noise = math.sqrt(linear.out_features) * float(linear.noise_std(math.sqrt(_LONGER * norms.mean_square_l2)))
    worker = math.sqrt(check_count(linear.out_features) / 2.5) * largest_tolerance(linear)
    for largest in LARGEST_FACTORS:
        if math.sqrt(_mean_square(largest)) * (_DEVIATIONS * noise + _OF_WORKER * worker) <= _HALF:
            return largest
    return None


def vector_count(largest: int) -> int:
    """Return how many vectors with factors up to `largest` miss a pattern with probability 2^-MISSED_BITS at most."""
    return math.ceil(MISSED_BITS / math.log2(largest))


def boundary_share(linear: LinearParameters) -> float:
    """Return how near to ±q/2, as a share of q/2, an output is whose wrap an error below the tolerance can decide."""
    return 2 * largest_tolerance(linear) / _HALF


def _mean_square(largest: int) -> float:
    """Return E[r²] of a factor uniform in ±{1, ..., largest}."""
    return (largest + 1) * (2 * largest + 1) / 6


class WrapChecks(Unsharable):
    """Hold the secret vectors of one circuit.

    Args:
        vectors: the r, int8 `[count, out]`.
        images: the v, float32 `[count, in]`.
    """

    __slots__ = ("_images", "_vectors")

    def __init__(self, vectors: NDArray[np.int8], images: NDArray[np.float32]) -> None:
        self._vectors, self._images = torch.from_numpy(vectors), torch.from_numpy(images)

    @classmethod
    def draw(cls, weight: Tensor, largest: int, random: SecretRandom) -> WrapChecks:
        """Draw vectors for int8 or int16 `weight [out, in]`, with factors up to `largest`, one of LARGEST_FACTORS.

        Raises:
            SecurityError: `random` is anything but a SecretRandom.
            InputError: the weight has another type or shape, or `largest` is another number.
        """
        if type(random) is not SecretRandom:
            raise SecurityError("check vectors are drawn from SecretRandom, never from a public seed or stream")
        if weight.dtype not in (torch.int8, torch.int16) or weight.dim() != 2 or largest not in LARGEST_FACTORS:
            raise InputError(f"a weight is int8 or int16 [out, in], got {weight.dtype} {list(weight.shape)}, {largest}")
        count, outputs = vector_count(largest), len(weight)
        kept_vectors: list[NDArray[np.int8]] = []
        kept_images: list[NDArray[np.float64]] = []
        longest = _LONGER * _mean_square(largest) * float(weight.double().square().sum())
        while len(kept_vectors) < count:
            drawn = count - len(kept_vectors)
            sizes = 1 + random.below_power_of_two(largest.bit_length() - 1, drawn * outputs)
            signs = 1 - 2 * random.below_power_of_two(1, drawn * outputs)
            vectors = (signs * sizes).astype(np.int8).reshape(drawn, outputs)
            images = _images(weight, vectors)
            short = np.square(images).sum(axis=1) <= longest
            kept_vectors += list(vectors[short])
            kept_images += list(images[short])
        return cls(np.stack(kept_vectors), np.stack(kept_images).astype(np.float32))

    @property
    def count(self) -> int:
        """Return the number of vectors."""
        return len(self._vectors)

    def wrapped(
        self, x: Tensor, product: Tensor, scale: Tensor, column_scale: Tensor | None = None, row_scale: Tensor | None = None
    ) -> Tensor:
        """Return which tokens have an output that wrapped: bool `[T]`.

        Args:
            x: float32 `[T, in]`, what was encrypted.
            product: float32 `[T, out]`, what was decrypted and verified.
            scale: float64 `[T]`, of the tokens as they were encoded.
            column_scale: float32 `[in]`, which x was multiplied with; None for ones.
            row_scale: float32 `[out]`, which the product was multiplied with; None for ones. Outputs with 0 have no weights.
        """
        vectors, images = self._vectors.float(), self._images
        if row_scale is not None:
            vectors = torch.where(row_scale == 0, 0.0, vectors / row_scale)
        if column_scale is not None:
            images = images * column_scale
        # With the few vectors on the left the products take half the time.
        deviation = (vectors @ product.t()).sub_(images @ x.detach().t()).abs_().amax(dim=0)  # [T]
        return ~(deviation.double() <= scale * _HALF)  # what is not finite is no number that a bound holds

    def pack(self) -> NDArray[np.uint8]:
        """Return what a file holds of this: uint8 `[count · (4·in + out)]`, the v in little-endian float32, then the r."""
        images = self._images.numpy().astype("<f4").reshape(-1).view(np.uint8)
        return np.concatenate([images, self._vectors.numpy().reshape(-1).view(np.uint8)])

    @classmethod
    def unpack(cls, packed: NDArray[Any], linear: LinearParameters) -> WrapChecks:
        """Invert `pack` for that circuit, without a copy.

        Raises:
            InputError: the array has another size or type, or holds values that are no such vectors.
        """
        inputs, outputs = linear.in_features, linear.out_features
        count, rest = divmod(packed.size, 4 * inputs + outputs)
        if packed.dtype != np.uint8 or packed.ndim != 1 or rest or count not in map(vector_count, LARGEST_FACTORS):
            raise InputError(f"the vectors that find wrapped products do not fit {inputs} inputs and {outputs} outputs")
        images = packed[: 4 * count * inputs].view("<f4").reshape(count, inputs)
        vectors = packed[4 * count * inputs :].view(np.int8).reshape(count, outputs)
        if not (np.isfinite(images).all() and (vectors != 0).all()):
            raise InputError("the vectors that find wrapped products are damaged")
        return cls(vectors, images)


def _images(weight: Tensor, vectors: NDArray[np.int8]) -> NDArray[np.float64]:
    """Compute v = rᵀ·W exactly, float64 `[count, in]`."""
    # Sums of GROUP int8 times 64 are at most 2^24 and exact in float32; those of int16 in float64.
    exact = torch.float32 if weight.dtype == torch.int8 else torch.float64
    result = torch.zeros((len(vectors), weight.shape[1]), dtype=torch.float64)
    for start in range(0, len(weight), GROUP):
        group = slice(start, start + GROUP)
        result += torch.from_numpy(vectors[:, group]).to(exact) @ weight[group].to(exact)
    return result.numpy()


def write_wrap_checks(path: Path, checks: WrapChecks) -> None:
    """Write vectors to `path` with mode 0600, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with opened_whole(path, mode=0o600) as file:
        np.save(file, checks.pack())


def read_wrap_checks(path: Path, linear: LinearParameters) -> WrapChecks:
    """Read the vectors of a circuit from their file.

    Raises:
        InputError: the file is missing, damaged or of another circuit.
    """
    try:
        packed = read_npy(path)
    except (OSError, ValueError) as error:
        raise unreadable(f"the vectors that find wrapped products, {path}", error, "export again") from error
    try:
        return WrapChecks.unpack(packed, linear)
    except InputError as error:
        raise InputError(f"{path}: {error}: export again") from None
