"""Properties of quantisation and encoding that hold for every input."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hecompile.he.encode import decode, encode
from hecompile.passes.offload.quantize import WEIGHT_BITS, quantize_weight

TINY = float(np.finfo(np.float32).tiny)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
MATRICES = arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=FLOATS)


@settings(max_examples=200, deadline=None)
@given(weight=MATRICES, bits=st.sampled_from(WEIGHT_BITS))
def test_quantized_weights_are_within_half_a_scale(weight: np.ndarray, bits: int) -> None:
    """|W - Q·s| ≤ s/2 up to the rounding of the float32 quotient, Qmax·2^-23 of s. A row below Qmax times the smallest
    normal float is zero."""
    largest = 2 ** (bits - 1) - 1
    quantized, scale = quantize_weight(weight, bits)
    assert quantized.dtype == (np.int8 if bits == 8 else np.int16) and scale.dtype == np.float32
    assert np.abs(quantized.astype(int)).max() <= largest
    error = np.abs(weight.astype(np.float64) - quantized * scale.astype(np.float64)[:, None])
    live = scale > 0
    assert (error[live] <= scale.astype(np.float64)[live, None] * (0.5 + largest * 2.0**-23)).all()
    assert (np.abs(weight[~live]) <= largest * TINY).all()
    assert not quantized[~live].any()
    assert (np.abs(quantized[live].astype(int)).max(axis=1, initial=0) == largest).all()


@settings(max_examples=200, deadline=None)
@given(x=MATRICES, bound=st.integers(1, 2**31 - 1))
def test_encoding_stays_in_the_bound_and_comes_back_within_half_a_step(x: np.ndarray, bound: int) -> None:
    values = torch.from_numpy(x)
    integers, scale = encode(values, bound)
    assert int(integers.to(torch.int64).abs().max()) <= bound
    back = decode(integers, scale, torch.float64)
    assert bool(((back - values.double()).abs() <= scale * (0.5 + 1e-6)).all())
    dark = (values == 0).all(dim=1)
    assert torch.equal(scale[:, 0] == 0, dark)
    assert not back[dark].any()
    # The largest magnitude of a token uses the whole range.
    assert bool((integers[~dark].to(torch.int64).abs().amax(dim=1) == bound).all())


@settings(max_examples=200, deadline=None)
@given(x=MATRICES, bound=st.integers(1, 2**20), norm_bound=st.floats(1.0, 2.0**20))
def test_encoding_with_a_norm_bound_keeps_one_of_the_two_bounds(x: np.ndarray, bound: int, norm_bound: float) -> None:
    integers, scale = encode(torch.from_numpy(x), bound, norm_bound)
    rounding = x.shape[1] ** 0.5 / 2
    norms = integers.double().norm(dim=1)
    assert bool(((integers.abs().amax(dim=1) <= bound) | (norms <= norm_bound * (1 + 1e-9) + rounding)).all())
    _, without = encode(torch.from_numpy(x), bound)
    assert bool((scale <= without).all())
