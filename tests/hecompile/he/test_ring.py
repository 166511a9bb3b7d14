"""Ring products against exact integers, at the extremes where float64 has the least room."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hecompile.he.kernels.ring_shape import trinomial
from hecompile.he.parameters import CATALOGUE, RingParameters, test_insecure_parameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import PublicSeed
from hecompile.he.ring import FoldedFft, folded_fft, rounding_error_bound, row_chunks, times_y
from tests.hecompile.he.exact import centred, inner_products, product

SEED = PublicSeed.from_hex("11" * 32)

EXTREME = -(2**31)


def extreme_pairs(params: RingParameters) -> tuple[torch.Tensor, list[np.ndarray]]:
    """Rows int32 `[n, rank, d]` and ternary secrets `[rank, d]` with coefficients and spectra as large as can be."""
    shape = (params.rank, params.ring_dim)
    generator = np.random.default_rng(1)
    # the signs of Re ζ^k gather the spectrum at one root, where |ŝ| is then about 2d/π
    sign = np.where(np.cos(np.arange(params.ring_dim) * np.pi / params.ring_dim) >= 0, 1, -1)
    alternating = np.where(np.arange(params.ring_dim) % 2, 1, -1)
    rows = [
        np.full(shape, EXTREME),
        np.broadcast_to(np.where(sign > 0, EXTREME, 2**31 - 1), shape),
        np.broadcast_to(np.where(alternating > 0, EXTREME, 2**31 - 1), shape),
        generator.integers(-(2**31), 2**31, shape),
    ]
    secrets = [
        np.ones(shape),
        -np.ones(shape),
        np.broadcast_to(sign, shape),
        np.broadcast_to(alternating, shape),
        generator.integers(-1, 2, shape),
    ]
    return torch.from_numpy(np.stack(rows).astype(np.int32)), [secret.astype(np.int8) for secret in secrets]


def before_rounding(fft: FoldedFft, values: torch.Tensor) -> np.ndarray:
    """The coefficients float64 `[..., d]` that `fft.inverse` rounds."""
    folded = fft._inverse_folded(values)
    return torch.cat((folded[..., 0], folded[..., 1]), dim=-1).numpy()


TOYS = [
    test_insecure_parameters(4, 1),
    test_insecure_parameters(16, 2),
    test_insecure_parameters(4, 3, packed=True),
    test_insecure_parameters(16, 6, packed=True),
]


@pytest.mark.parametrize("params", [*CATALOGUE.values(), *TOYS])
def test_product_is_exact_at_the_extremes(params: RingParameters) -> None:
    fft = folded_fft(params)
    rows, secrets = extreme_pairs(params)
    matrix = fft.forward(rows.transpose(0, 1))  # [rank, n, d/2]
    for secret in secrets:
        exact = inner_products(rows, secret, trinomial(params))  # [n, d]
        vector = fft.forward(torch.from_numpy(secret))
        coefficients = before_rounding(fft, fft.accumulate(matrix, vector))
        # measured: 0.002 at most, a factor 20 to 40 below the proven bound, which is itself below 1/8
        assert np.abs(coefficients - exact).max() <= rounding_error_bound(params) / 5
        assert torch.equal(fft.inner_product(matrix, vector).long(), centred(exact))


def test_extremes_really_are_extreme() -> None:
    params = CATALOGUE["2048x1"]
    rows, secrets = extreme_pairs(params)
    largest = max(int(np.abs(inner_products(rows, secret)).max()) for secret in secrets)
    assert largest == 2048 * 2**31


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 15, 16])
def test_only_the_coefficients_asked_for(tokens: int) -> None:
    params = test_insecure_parameters(16, 2)
    fft = folded_fft(params)
    rows, secrets = extreme_pairs(params)
    matrix, vector = fft.forward(rows.transpose(0, 1)), fft.forward(torch.from_numpy(secrets[-1]))
    part = fft.inner_product(matrix, vector, tokens)
    assert part.shape == (4, tokens)
    assert torch.equal(part.long(), centred(inner_products(rows, secrets[-1]))[:, :tokens])


@pytest.mark.parametrize("of_trinomial", [False, True])
def test_forward_and_inverse_are_inverse(of_trinomial: bool) -> None:
    words = torch.randint(-(2**31), 2**31, (3, 64), generator=torch.Generator().manual_seed(2)).to(torch.int32)
    fft = FoldedFft(64, of_trinomial)
    assert torch.equal(fft.inverse(fft.forward(words)), words)


def test_forward_takes_the_values_at_the_odd_roots() -> None:
    a = np.array([3, -1, 4, 1, -5, 9, 2, 6])
    roots = np.exp(1j * np.pi / 8) ** (1 - 4 * np.arange(4))
    assert np.allclose(roots**8, -1)
    assert np.allclose(FoldedFft(8).forward(torch.from_numpy(a)).numpy(), np.polyval(a[::-1], roots))


def test_the_other_modulus_has_its_own_roots() -> None:
    a = np.array([3, -1, 4, 1, -5, 9, 2, 6])
    roots = np.exp(1j * np.pi / 12) ** (1 - 6 * np.arange(4))
    assert np.allclose(roots**8 - roots**4, -1)
    assert np.allclose(FoldedFft(8, of_trinomial=True).forward(torch.from_numpy(a)).numpy(), np.polyval(a[::-1], roots))


@pytest.mark.parametrize("of_trinomial", [False, True])
def test_times_y(of_trinomial: bool) -> None:
    a = np.array([[3, -1, 4, 1, -5, 9, 2, 6], [-(2**31)] * 8], dtype=np.int32)
    y = np.zeros(8, dtype=np.int64)
    y[1] = 1
    wanted = np.stack([product(row.astype(np.int64), y, of_trinomial) for row in a])
    assert ((times_y(a, of_trinomial) - wanted) % 2**32 == 0).all()


@pytest.mark.parametrize("rank", [2, 3, 4, 6, 12])
def test_rows_of_a_packed_ring_multiply_by_its_elements(rank: int) -> None:
    """⟨row, s⟩ of the `rank` rows that an element a serves are the components of a·s in the large ring, X^rank = Y."""
    params = test_insecure_parameters(8, rank, packed=True)
    public = PublicMatrix(params, SEED, 8 * rank * 2)
    rows = public.coefficients(slice(0, public.rows))  # [16 · rank, rank, 8]
    secret = np.random.default_rng(4).integers(-1, 2, (rank, 8)).astype(np.int8)
    masks = inner_products(rows, secret, trinomial(params)).reshape(2, rank, 8, 8)  # [g, k, l, coefficient]
    for g in range(2):
        for lane in range(8):
            element = SEED.stream("A").uint32(8 * g + lane, params.lattice_dim).view(np.int32).reshape(rank, 8)
            # coefficient t of component k belongs to X^(rank·t + k)
            large = product(element.T.reshape(-1).astype(np.int64), secret.T.reshape(-1).astype(np.int64), rank % 3 == 0)
            assert ((masks[g, :, lane] - large.reshape(8, rank).T) % 2**32 == 0).all()


@pytest.mark.parametrize(("rows", "ring_dim"), [(1, 512), (256, 512), (257, 512), (1000, 2048)])
def test_chunks_cover_the_rows_once(rows: int, ring_dim: int) -> None:
    chunks = row_chunks(rows, ring_dim)
    assert [row for chunk in chunks for row in range(rows)[chunk]] == list(range(rows))
    assert all((chunk.stop - chunk.start) * ring_dim <= 2**17 for chunk in chunks)
