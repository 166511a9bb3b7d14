"""The fused kernels against the simple path: the same ciphertexts and the same results, bit for bit.

Where decryption is in float32 the results are those of the simple path within the proven error of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from hecompile.errors import InputError, SecurityError, WorkerError
from hecompile.he import fused
from hecompile.he.encode import decode, encode
from hecompile.he.fused import RealKey, decrypt_reals, encrypt_reals
from hecompile.he.hints import Hint
from hecompile.he.kernels.ring_shape import trinomial
from hecompile.he.kernels.threads import for_each
from hecompile.he.kernels.transform import interleave, transform
from hecompile.he.parameters import (
    CATALOGUE,
    SINGLE_ERROR_STD,
    LinearParameters,
    RingParameters,
    test_insecure_parameters,
)
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import ERROR_BOUND, PublicSeed, SecretRandom
from hecompile.he.ring import SINGLE, rounding_error_bound
from hecompile.he.scheme import DecryptionKey, _encrypt_with, blocks, decrypt, evaluate, setup
from tests.hecompile.he.exact import inner_products, words

SEED = PublicSeed(bytes(range(32)))
TOY = test_insecure_parameters(16, 2)


def reals(tokens: int, features: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed)) * 3


def weights(rows: int, columns: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(-127, 128, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def key_of(params: RingParameters, linear: LinearParameters, scale: np.ndarray, secrets: np.ndarray) -> RealKey:
    return RealKey(params, linear, secrets, scale)


def check_against_the_simple_path(
    params: RingParameters, tokens: int, shape: tuple[int, int], upload: int, reply_bits: int, extreme: bool = False,
    offset: int = 0,
) -> None:  # fmt: skip
    """offset: bytes from a cache line to where the ciphertext begins."""
    out_features, in_features = shape
    weight = weights(out_features, in_features)
    if upload == 8:
        weight = weight.sign()  # larger ones leave no room for an input
    linear = LinearParameters.from_weight(weight, upload, reply_bits)
    public = PublicMatrix(params, SEED, in_features + 3)
    rng = np.random.default_rng(7)
    count = len(blocks(tokens, params.ring_dim))
    secrets = rng.integers(-1, 2, (count, params.rank, params.ring_dim)).astype(np.int8)
    error = rng.integers(-ERROR_BOUND, ERROR_BOUND + 1, (tokens, in_features)).astype(np.int8)
    x = reals(tokens, in_features)
    if extreme:
        secrets[:], error[:] = 1, ERROR_BOUND
        x = x.sign() * 7.0
    column, row = torch.rand(in_features) + 0.5, torch.rand(out_features) + 0.5
    exact = x.double() * column.double()
    scale = fused._scales(x, column.double().numpy(), linear)
    by_encode = encode(exact, linear.input_bound, linear.norm_bound)[1][:, 0].numpy()
    assert np.allclose(scale, by_encode, rtol=1e-12, atol=0)
    integers = (exact * torch.from_numpy(1 / scale)[:, None]).round().long()
    assert bool(linear.admits(integers).all())

    wanted, simple_key = _encrypt_with(public, list(secrets), error, integers, linear)
    key = key_of(params, linear, scale, secrets)
    planes = torch.full((wanted.planes.numel() + offset,), 99, dtype=torch.uint8)[offset:].reshape(wanted.planes.shape)
    secrets_now = key.secrets_extended() if params.packed else key.secrets_transformed()
    for part in fused._parts(in_features, tokens, params):
        own_error = np.ascontiguousarray(error[:, part])
        fused._encrypt_part(
            public.transformed(in_features), secrets_now, x, column.double().numpy(), key, planes, part, own_error
        )
    assert torch.equal(planes, wanted.planes)

    reply = evaluate(weight, planes, linear)
    coefficients = setup(weight, public)
    results = []
    for keep in (np.float64, np.float32, None):
        hint = Hint.from_coefficients(params, coefficients, keep_transformed=keep)
        results.append(decrypt_reals(key, hint, reply, linear, row))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    transformed = transform(interleave(coefficients), params, precision=np.float32)
    single = Hint(params, transformed.reshape(-1, params.lattice_dim, 8), out_features)
    if linear.decryption_precision is np.float32:
        assert torch.equal(decrypt_reals(key, single, reply, linear, row), results[0])
    else:
        with pytest.raises(InputError, match="for decryption in float32 alone"):
            decrypt_reals(key, single, reply, linear, row)
    integers = decrypt(simple_key, hint, reply, linear)
    simple = decode(integers, torch.from_numpy(scale)[:, None], torch.float64)
    if linear.decryption_precision is np.float64:
        assert torch.equal(results[0], (simple * row.double()).to(torch.float32))
    else:
        found = results[0].double() / row.double() / torch.from_numpy(scale)[:, None]
        assert (found - integers).abs().max() <= rounding_error_bound(params, SINGLE) + 2**7  # and a float32's last place
        assert extreme or (found - integers).square().mean().sqrt() <= SINGLE_ERROR_STD


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 55])
@pytest.mark.parametrize("shape", [(9, 12), (64, 8), (5, 3), (70, 130), (1, 65), (3, 1300), (1300, 3)])
def test_any_number_of_tokens_and_features(tokens: int, shape: tuple[int, int]) -> None:
    check_against_the_simple_path(TOY, tokens, shape, 21, 16)


@pytest.mark.parametrize("rank", [2, 3, 4, 6, 12])
@pytest.mark.parametrize("shape", [(9, 12), (5, 3), (70, 130), (1, 215)])
def test_packed_rings(rank: int, shape: tuple[int, int]) -> None:
    check_against_the_simple_path(test_insecure_parameters(16, rank, packed=True), 55, shape, 24, 16)


@pytest.mark.parametrize("ring_dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(("rank", "packed"), [(1, False), (3, False), (2, True), (6, True)])
def test_every_ring_dim_from_the_smallest_on(ring_dim: int, rank: int, packed: bool) -> None:
    params = test_insecure_parameters(ring_dim, rank, packed=packed)
    for more in (1, ring_dim // 8 - 1, ring_dim // 8, ring_dim // 8 + 1, ring_dim // 2 + 1):  # a quarter of the points
        check_against_the_simple_path(params, 2 * ring_dim + more, (5, 70), 22, 13)


@pytest.mark.parametrize(("features", "offset"), [(64, 0), (192, 0), (200, 0), (32, 0), (192, 32), (192, 1)])
@pytest.mark.parametrize(("upload", "reply"), [(8, 8), (16, 16), (21, 12), (24, 16), (32, 16)])
def test_wire_bytes_past_the_caches(
    monkeypatch: pytest.MonkeyPatch, features: int, offset: int, upload: int, reply: int
) -> None:
    """As large ciphertexts are written where their lines are cache lines, and as others where they are not."""
    monkeypatch.setattr(fused, "_PAST_CACHES", 0)
    check_against_the_simple_path(TOY, 55, (5, features), upload, reply, offset=offset)


def test_a_ring_too_small_for_the_kernels_is_refused() -> None:
    """At ring_dim 8 and below they would leave words of the masks unwritten, and so send them in the clear."""
    for ring_dim in (4, 8):
        with pytest.raises(SecurityError, match=f"the kernels are for ring_dim 16 or more, not {ring_dim}"):
            public = PublicMatrix(test_insecure_parameters(ring_dim, 2), SEED, 8)
            encrypt_reals(public, reals(3, 8), LinearParameters.from_weight(weights(2, 8), 24, 16))


@pytest.mark.parametrize(
    ("upload", "reply"),
    [(32, 32), (32, 24), (31, 19), (32, 16), (24, 24), (24, 16), (23, 17), (22, 22), (17, 16), (16, 16), (32, 8), (29, 9)],
)
@pytest.mark.parametrize("extreme", [False, True])
def test_any_number_of_bits(upload: int, reply: int, extreme: bool) -> None:
    check_against_the_simple_path(TOY, 20, (11, 21), upload, reply, extreme)


@pytest.mark.parametrize("params", CATALOGUE.values(), ids=CATALOGUE)
@pytest.mark.parametrize("extreme", [False, True])
def test_every_ring_of_the_catalogue(params: RingParameters, extreme: bool) -> None:
    check_against_the_simple_path(params, params.ring_dim + 5, (20, 150), 22, 13, extreme)


def test_one_thread_and_several_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_CHUNK", 64)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            check_against_the_simple_path(TOY, 30, (150, 210), 24, 16)
    finally:
        torch.set_num_threads(before)


def test_threads_share_what_is_worth_waking_them_for() -> None:
    ring = next(iter(CATALOGUE.values()))
    blocks_of_2048 = math.ceil(fused._SHARED_FROM / (2048 * ring.lattice_dim))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert len(fused._parts(64, 1, ring)) == 1
        assert len(fused._parts(2048, ring.ring_dim * (blocks_of_2048 - 1) + 1, ring)) == 2  # the last block counts whole
        torch.set_num_threads(1)
        assert len(fused._parts(2048, ring.ring_dim * (blocks_of_2048 - 1) + 1, ring)) == 1
    finally:
        torch.set_num_threads(before)


def round_trip(
    x: torch.Tensor, weight: torch.Tensor, params: RingParameters = TOY, column_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, RealKey]:
    linear = LinearParameters.from_weight(weight, 32, 32)
    public = PublicMatrix(params, SEED, linear.in_features)
    ciphertext, key = encrypt_reals(public, x, linear, column_scale)
    assert ciphertext.planes.shape == (4, key.tokens, linear.in_features)
    hint = Hint.from_coefficients(params, setup(weight, public))
    reply = (
        evaluate(weight, ciphertext.planes, linear) if key.tokens else torch.empty(4, 0, len(weight), dtype=torch.uint8)
    )
    return decrypt_reals(key, hint, reply, linear), key


def test_result_is_the_product_within_the_noise() -> None:
    weight = weights(24, 40)
    linear = LinearParameters.from_weight(weight, 32, 32)
    x = reals(700, 40)
    result, key = round_trip(x, weight, CATALOGUE["512x3"])
    integers = (x.double() / torch.from_numpy(key.scale)[:, None]).round()
    noise = result.double() / torch.from_numpy(key.scale)[:, None] - integers @ weight.double().t()
    assert 0 < noise.abs().max() <= linear.noise_bound + 2**7  # and half a unit in the last place of a float32
    predicted = torch.as_tensor(linear.noise_std(weight.double().norm(dim=1)))
    assert (noise.square().mean(dim=0).sqrt() / predicted - 1).abs().max() < 0.2


def test_every_ciphertext_is_fresh() -> None:
    linear = LinearParameters.from_weight(weights(9, 12), 32, 32)
    public, x = PublicMatrix(TOY, SEED, 12), reals(20, 12)
    one, other = encrypt_reals(public, x, linear)[0].planes, encrypt_reals(public, x, linear)[0].planes
    # Equal in one byte of 256 by chance; 960 bytes give 3.75 ± 1.9.
    assert int((one == other).sum()) < 3.75 + 10 * 1.9


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 11])
def test_values_that_are_not_finite_are_refused(bad: float, place: int) -> None:
    x = reals(4, 12)
    x[2, place] = bad
    with pytest.raises(InputError, match="infinite or NaN"):
        round_trip(x, weights(9, 12))


def test_wrong_shapes_are_refused() -> None:
    linear = LinearParameters.from_weight(weights(9, 12), 32, 32)
    public = PublicMatrix(TOY, SEED, 12)
    for x in (reals(4, 11), reals(4, 12).double(), reals(4, 12).reshape(2, 2, 12)):
        with pytest.raises(InputError, match="float32"):
            encrypt_reals(public, x, linear)
    with pytest.raises(InputError, match="rows"):
        encrypt_reals(PublicMatrix(TOY, SEED, 11), reals(4, 12), linear)
    with pytest.raises(InputError, match="scale per feature"):
        encrypt_reals(public, reals(4, 12), linear, torch.ones(11))
    key = encrypt_reals(public, reals(4, 12), linear)[1]
    hint = Hint.from_coefficients(TOY, setup(weights(9, 12), public))
    with pytest.raises(WorkerError, match="reply must be uint8"):
        decrypt_reals(key, hint, torch.zeros(4, 4, 8, dtype=torch.uint8), linear)


def test_a_key_shows_nothing_and_cannot_be_copied() -> None:
    linear = LinearParameters.from_weight(weights(9, 12), 32, 32)
    key = encrypt_reals(PublicMatrix(TOY, SEED, 12), reals(4, 12), linear)[1]
    assert isinstance(key, DecryptionKey)
    assert repr(key) == "<RealKey>"
    with pytest.raises(SecurityError):
        key.__reduce_ex__(2)


def test_first_encryption_of_many_parts_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_CHUNK", 64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        round_trip(reals(30, 2048), weights(1024, 2048))  # A is expanded by the same threads, which must not wait for it
    finally:
        torch.set_num_threads(before)


def test_work_shared_out_from_within_shared_work_runs_where_it_is() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    done: list[int] = []
    try:
        for_each(lambda outer: for_each(lambda inner: done.append(10 * outer + inner), range(5)), range(6))
    finally:
        torch.set_num_threads(before)
    assert sorted(done) == [10 * outer + inner for outer in range(6) for inner in range(5)]


def test_bulk_randomness_is_fresh_and_uniform() -> None:
    samples = [SecretRandom().discrete_gaussian((4096,)) for _ in range(2)]
    assert not np.array_equal(*samples)


class _LargestMatrix(PublicMatrix):
    """A of words as large as can be, with the signs that gather a spectrum at one root."""

    def _blocks(self, blocks: Sequence[int]) -> np.ndarray:
        turns = np.arange(self.params.ring_dim) * (2 / 3 if trinomial(self.params) else 1) / self.params.ring_dim
        words = np.where(np.cos(np.pi * turns) >= 0, -(2**31), 2**31 - 1).astype(np.int32)
        return np.broadcast_to(words, (len(blocks), self.params.rank, self.params.ring_dim)).copy()


@pytest.mark.parametrize("params", CATALOGUE.values(), ids=CATALOGUE)
def test_masks_are_exact_where_words_and_secrets_are_as_large_as_can_be(params: RingParameters) -> None:
    """A ciphertext of zeros without errors is the mask ⟨A, s⟩ alone, which must be that of exact integers."""
    rows, d = 8 * params.packing + 3, params.ring_dim
    public = _LargestMatrix(params, SEED, rows)
    gathered = np.where(np.cos(np.pi * np.arange(d) / d) >= 0, 1, -1)
    secrets = np.stack([np.ones((params.rank, d)), np.broadcast_to(gathered, (params.rank, d))]).astype(np.int8)
    key = key_of(params, LinearParameters(rows, 8, 80, 30.0, 32, 32), np.ones(2 * d), secrets)
    planes = torch.zeros((4, 2 * d, rows), dtype=torch.uint8)
    transformed = key.secrets_extended() if params.packed else key.secrets_transformed()
    fused._encrypt_part(
        public.transformed(rows), transformed, torch.zeros(2 * d, rows), np.ones(rows), key, planes, slice(0, rows),
        np.zeros((2 * d, rows), np.int8),
    )  # fmt: skip
    found, some = words(planes), [0, rows - 4, rows - 1]  # of the first and last components, and of another element
    for block, secret in enumerate(secrets):
        exact = inner_products(public.coefficients(slice(0, rows))[some], secret, trinomial(params))  # [3, d]
        assert (found[block * d : (block + 1) * d, some] == exact.T % 2**32).all()
