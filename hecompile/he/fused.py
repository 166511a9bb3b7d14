"""Encrypt reals and decrypt to reals in one pass over memory: the client's side of the scheme, at speed.

The scheme is that of `scheme.py`. Given the same scales, secrets and errors, a ciphertext made here is to the bit the one
that `scheme.encrypt` makes of the integers that `encode` makes. `decrypt_reals` is `decode(scheme.decrypt(...))`: to the
bit where `LinearParameters.decryption_precision` is float64, within `SINGLE_ERROR_BOUND` where it is float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.errors import InputError, NotFiniteError, SecurityError
from hecompile.he.check_tolerances import GROUP
from hecompile.he.check_vectors import Checks
from hecompile.he.hints import Hint
from hecompile.he.kernels import decrypt_tiles, encrypt_tiles
from hecompile.he.kernels.arguments import CheckSums, Extent, HintArrays, Planes, Ring, Rows, Scales, Scratch
from hecompile.he.kernels.lines import SUM_LANES
from hecompile.he.kernels.norms import row_scales
from hecompile.he.kernels.scratch import result_of, scratch
from hecompile.he.kernels.threads import for_each, slices
from hecompile.he.kernels.tiles import LINES, WIDTH, tile_words
from hecompile.he.kernels.transform import ring_of
from hecompile.he.kernels.vectors import LANES
from hecompile.he.parameters import LinearParameters, RingParameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import SecretRandom
from hecompile.he.scheme import Ciphertext, DecryptionKey, blocks, keygen
from hecompile.he.verification import Expectation, Received

_TOKENS = 2048
"""Tokens processed at a time, a multiple of every ring_dim: a tile of them fits the second-level cache."""

_CHUNK = 2**20
"""Words encrypted or decrypted by one call of a kernel: many against the cost of the call, few against all words."""

_SHARED_FROM = 9 * 2**18
"""Products of a number of the matrix and one of a secret, at n points, from which on threads share them. Waking a thread and
waiting for it takes 0.1 to 0.3 ms, and a million products 0.3 to 0.8: fewer are done sooner by one thread."""

_PAST_CACHES = 2**20
"""Bytes of a ciphertext from which on they are written past the caches: a store to a line that no cache has reads it from
memory first, and two threads wait for that. A smaller ciphertext is still largely in a cache when it is sent."""

_NOT_PACKED = np.empty(0, dtype=np.uint8)


class RealKey(DecryptionKey):
    """Extend a `DecryptionKey` by the scale of each token and by what its reply must sum to."""

    __slots__ = ("expectation", "scale")

    def __init__(
        self, params: RingParameters, linear: LinearParameters, secrets: NDArray[np.int8], scale: NDArray[np.float64],
        expectation: Expectation | None = None,
    ) -> None:  # fmt: skip
        super().__init__(params, linear, len(scale), secrets)
        self.expectation = expectation  # of the reply; None where it is not to be checked
        self.scale = scale  # float64 [T]; 0 for a row of zeros


def encrypt_reals(
    public: PublicMatrix, x: Tensor, linear: LinearParameters, column_scale: Tensor | None = None,
    checks: Checks | None = None,
) -> tuple[Ciphertext, RealKey]:  # fmt: skip
    """Encrypt the rows of x, each block of ring_dim of them under a fresh secret.

    A row of zeros is encrypted like any other: what is sent has a shape that depends on the shape of x alone.

    Args:
        public: A, with at least in_features rows.
        x: float32 `[T, in_features]`.
        linear: the circuit; each token is scaled to use all the room that it has.
        column_scale: float `[in_features]`, to encrypt x · column_scale instead.
        checks: of the circuit, for `decrypt_reals` to verify the reply with.

    Returns:
        The ciphertext and its key.

    Raises:
        InputError: x has the wrong shape or type; checks of another circuit.
        NotFiniteError: x has a value that is infinite or NaN.
        SecurityError: the ring is larger than these kernels are for.
    """
    if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != linear.in_features:
        raise InputError(
            f"the rows to encrypt must be float32 [T, {linear.in_features}], got {x.dtype} {list(x.shape)}"
        )
    if public.rows < linear.in_features:
        raise InputError(f"the public matrix has {public.rows} rows, the circuit {linear.in_features} inputs")
    if checks is not None:
        checks.check_fits(linear)
    if _TOKENS % public.params.ring_dim:  # a piece would begin in the middle of a block's secret
        raise SecurityError(f"ring_dim {public.params.ring_dim} does not divide {_TOKENS}: choose a ring of the catalogue")
    factors = _factors(column_scale, linear.in_features)
    rows = x.detach().contiguous()
    scale = _scales(rows, factors, linear)
    params = public.params
    secrets = [keygen(params).spend() for _ in blocks(len(rows), params.ring_dim)]
    stacked = np.array(secrets, dtype=np.int8).reshape(-1, params.rank, params.ring_dim)
    random = SecretRandom()
    expectation = None if checks is None else Expectation.draw(checks, linear, len(rows), random)
    key = RealKey(params, linear, stacked, scale, expectation)
    del secrets, stacked  # the key has them: no other frame does
    planes = result_of((linear.upload_limbs, len(rows), linear.in_features), np.uint8)
    if len(rows):
        # Made before the threads, which share them: a thread that waits for others to make one could wait for ever.
        transformed = key.secrets_extended() if params.packed else key.secrets_transformed()
        matrix = public.transformed(linear.in_features)
        for_each(
            lambda part: _encrypt_part(
                matrix, transformed, rows, factors, key, planes, part, _errors(random, len(rows), part)
            ),
            _parts(linear.in_features, len(rows), params),
        )
    return Ciphertext(planes), key


def _errors(random: SecretRandom, tokens: int, part: slice) -> NDArray[np.int8]:
    """Draw the errors of features `part`: int8 `[tokens, part]`, in this thread's memory."""
    width = part.stop - part.start
    return random.discrete_gaussian((tokens, width), scratch("error", tokens * width, np.int8))


def _encrypt_part(
    matrix: NDArray[np.float64], secrets: NDArray[np.float64], rows: Tensor, factors: NDArray[np.float64], key: RealKey,
    planes: Tensor, part: slice, error: NDArray[np.int8],
) -> None:  # fmt: skip
    """Encrypt features `part`, which starts at a multiple of 8; error is int8 `[T, part]`."""
    params, linear, tokens = key.params, key.linear, len(rows)
    features, width = linear.in_features, part.stop - part.start
    ring = ring_of(params)
    per_token = 2 * params.rank - 1 if params.packed else params.rank
    inverse = np.divide(1.0, key.scale, out=np.zeros(tokens), where=key.scale > 0)  # a row of zeros stays one
    vectors = _check_vectors(key, part, lambda checks: checks.images_by_lines, np.int32)
    past_caches = planes.numel() >= _PAST_CACHES
    for piece in slices(tokens, _TOKENS):
        count, start = piece.stop - piece.start, piece.start * features + part.start
        checks = _check_sums(key, vectors, piece, features, LINES)
        encrypt_tiles.encrypt(
            ring,
            Extent(part.start // LANES, width, count),
            matrix,
            secrets[piece.start * per_token :],
            Rows(rows.numpy().reshape(-1), start, features),
            Scales(inverse[piece], factors[part]),
            error.reshape(-1)[piece.start * width :],
            Planes(planes.numpy().reshape(-1), start, tokens * features, features, linear.upload_bits, past_caches),
            checks,
            _scratch(ring, count, np.float64),
        )
        if key.expectation is not None:
            key.expectation.add(checks.sums, checks.total_sums, piece)


def decrypt_reals(
    key: RealKey, hint: Hint, reply: Tensor, linear: LinearParameters, row_scale: Tensor | None = None
) -> Tensor:
    """Return x·Wᵀ, plus noise within `linear.noise_bound` times the token's scale; exact zeros for rows of zeros.

    Args:
        key: of the ciphertext that was evaluated.
        hint: of the circuit's weight under the same A.
        reply: uint8 `[reply_bytes, T, out_features]`.
        linear: the circuit.
        row_scale: float `[out_features]`, to multiply the result with.

    Returns:
        float32 `[T, out_features]`.

    Raises:
        VerificationError: the reply is not the requested product; nothing of it is returned.
        WorkerError: the reply does not have the requested shape.
        InputError: the key, hint and circuit do not belong together.
    """
    key.check(hint, reply, linear)
    factors = _factors(row_scale, linear.out_features)
    result = result_of((key.tokens, linear.out_features), np.float32)
    if key.tokens:
        planes = reply.contiguous()
        key.secrets_transformed(linear.decryption_precision)  # before the threads, which share them
        received = Received(key.expectation, key.tokens)
        for_each(
            lambda part: _decrypt_part(key, hint, planes, linear, factors, result, part, received),
            _parts(linear.out_features, key.tokens, key.params),
        )
        received.verify(linear)
    return result


def _decrypt_part(
    key: RealKey, hint: Hint, planes: Tensor, linear: LinearParameters, factors: NDArray[np.float64], result: Tensor,
    part: slice, received: Received,
) -> None:  # fmt: skip
    """Decrypt features `part`, which starts at a multiple of 8, into `result`, and add to the sums of `received`."""
    params, tokens, features = key.params, key.tokens, linear.out_features
    precision = linear.decryption_precision
    ring = ring_of(params, precision)
    kept = hint.transformed
    if kept is None or kept.dtype != precision:
        kept = np.empty(0, precision)
    use_packed = kept.size == 0 and hint.packed.size > 0
    words = scratch("hint", LANES * params.lattice_dim, np.int32) if use_packed else hint.words
    arrays = HintArrays(words, kept, hint.packed if use_packed else _NOT_PACKED, hint.bits)
    secrets = key.secrets_transformed(precision)
    vectors = _check_vectors(key, part, lambda checks: checks.vectors_by_lines, np.int8)
    for piece in slices(tokens, _TOKENS):
        count, start = piece.stop - piece.start, piece.start * features + part.start
        checks = _check_sums(key, vectors, piece, GROUP, 1)
        decrypt_tiles.decrypt(
            ring,
            Extent(part.start // LANES, part.stop - part.start, count),
            arrays,
            secrets[piece.start * params.rank :],
            Planes(planes.numpy().reshape(-1), start, tokens * features, features, linear.reply_bits),
            Scales(key.scale[piece], factors[part]),
            Rows(result.numpy().reshape(-1), start, features),
            checks,
            _scratch(ring, count, precision),
        )
        received.add(checks.sums, checks.total_sums, piece)


def _check_vectors(
    key: RealKey, part: slice, by_lines: Callable[[Checks], NDArray[Any]], kind: type[np.integer]
) -> NDArray[Any]:
    """Return the factors of the words of `part` in the sums of verification: `[lines, rows, 64]` of that kind."""
    if key.expectation is None:
        return np.empty((0, 0, WIDTH), kind)
    return by_lines(key.expectation.checks)[part.start // WIDTH :]


def _check_sums(key: RealKey, vectors: NDArray[Any], piece: slice, features: int, lines: int) -> CheckSums:
    """Return sums of zero for the tokens of `piece`, and their factors.

    Each check covers `features` features; a tile has up to `lines` lines of a token.
    """
    count, expectation = piece.stop - piece.start, key.expectation
    if expectation is None:
        none = np.zeros((0, count, SUM_LANES), np.int32)
        no_total = np.zeros(WIDTH, np.int32)
        no_drawn, no_variants = np.zeros(0, np.int64), np.zeros(count, np.int64)
        return CheckSums(vectors, no_drawn, no_variants, none, _TOKENS, no_total, none, features)
    windows, (_, variants, checks) = math.ceil(count / expectation.window), expectation.total_sums.shape
    return CheckSums(
        vectors,
        expectation.drawn,
        expectation.variants[piece],
        np.zeros((checks, count, SUM_LANES), np.int32),
        expectation.window,
        scratch("totals", windows * lines * WIDTH, np.int32),
        np.zeros((windows, variants * checks, SUM_LANES), np.int32),
        features,
    )


def _scratch(ring: Ring, tokens: int, precision: type[np.floating]) -> Scratch:
    """Return this thread's memory for a call of a kernel that computes in that precision."""
    return Scratch(
        scratch("tile", tile_words(tokens), np.int32),
        scratch(f"values {precision.__name__}", 16 * ring.n * ring.rank, precision),
        scratch(f"work {precision.__name__}", 16 * ring.n, precision),
    )


def _scales(rows: Tensor, factors: NDArray[np.float64], linear: LinearParameters) -> NDArray[np.float64]:
    """Return the scale that `encode` chooses for each row times `factors`: float64 `[T]`, 0 for a row of zeros.

    Raises:
        NotFiniteError: a value is infinite or NaN.
    """
    tokens, features = rows.shape
    scales = np.empty(tokens)
    flat = rows.numpy().reshape(-1)

    def measure(part: slice) -> None:
        piece = flat[part.start * features : part.stop * features]
        row_scales(piece, factors, linear.input_bound, linear.norm_bound, scales[part])

    for_each(measure, slices(tokens, max(1, _CHUNK // features)))
    if math.isnan(scales.min(initial=1.0)):
        raise NotFiniteError("a value to encrypt is infinite or NaN: training has diverged or the model has overflowed")
    return scales


def _factors(scale: Tensor | None, features: int) -> NDArray[np.float64]:
    if scale is None:
        return np.ones(features)
    if scale.shape != (features,):
        raise InputError(f"a scale per feature is [{features}], got {list(scale.shape)}")
    return scale.detach().double().contiguous().numpy()


def _parts(features: int, tokens: int, params: RingParameters) -> list[slice]:
    """Cut the features into pieces of whole tiles, at least two where threads can share them and it pays."""
    products = features * params.lattice_dim * math.ceil(tokens / params.ring_dim)  # few tokens cost what a block does
    shared = math.ceil(features / (2 if products >= _SHARED_FROM and torch.get_num_threads() > 1 else 1))
    step = max(1, min(_CHUNK // max(1, tokens), shared) // WIDTH) * WIDTH
    return slices(features, step)
