"""Expand each approximated operator into sums and products, with constants where they cost no level.

Attention needs no product by a constant except in the series. Factors of its scores go into the rotary tables of q (and of
k, for the Gaussian kernel), and the mask drops entries.

* power: f·t^p/n = (t·(f/n)^(1/p))^p, with f = 2/(L + U) of Goldschmidt's start and n the keys that a query sees (length
  agnostic), so that the sum over the keys lies in (0, 2) and the quotient needs no factor.
* gaussian: 1 + x/2^k = 1 - ‖q' - k'‖² with q' = q·√(scale/2^(k+1)) and k' likewise.
* chebyshev: q·scale/h, h half the width of the domain; f^(1/2^s) goes into the coefficients; Σw² is multiplied by its f.
"""

from __future__ import annotations

import numpy as np

from hecompile.approximation import goldschmidt, silu
from hecompile.approximation.arithmetic import power, squared
from hecompile.approximation.chebyshev import evaluate
from hecompile.approximation.inverse_sqrt import newton
from hecompile.errors import LegalityError
from hecompile.graph.operators import Attributes
from hecompile.polynomial.graph_values import GraphValue, concatenated


def query_factor(op_type: str, attributes: Attributes, mask: np.ndarray) -> np.ndarray:
    """Return the factor of q [B, heads, S, D] at each position, f64 [S], for a mask [S, S]."""
    length = mask.shape[0]
    scale = attributes["scale"]
    if op_type == "GaussianAttention":
        return np.full(length, gaussian_factor(attributes))
    if op_type == "ChebyshevAttention":
        half = (attributes["domain_upper"] - attributes["domain_lower"]) / 2
        return np.full(length, scale / half)  # of a score, whether halved or not: the unit interval is the same
    factor = goldschmidt.start_factor(attributes["ratio_lower"], attributes["ratio_upper"])
    visible = mask.sum(-1) if attributes["form"] == "length_agnostic" else np.ones(length)
    result: np.ndarray = scale * (factor / visible) ** (1 / attributes["power"])
    return result


def key_factor(op_type: str, attributes: Attributes) -> float:
    """Return the factor of k."""
    return gaussian_factor(attributes) if op_type == "GaussianAttention" else 1.0


def gaussian_factor(attributes: Attributes) -> float:
    return float((attributes["scale"] / 2.0 ** (attributes["squarings"] + 1)) ** 0.5)


def attention(
    op_type: str, attributes: Attributes, q: GraphValue, k: GraphValue, v: GraphValue, mask: np.ndarray
) -> GraphValue:
    """Expand an attention whose q and k already have their factors; mask of zeros and ones, [queries, S].

    Raises LegalityError for exact forms, which are no polynomials.
    """
    check_polynomial(op_type, attributes)
    if op_type == "GaussianAttention":
        return _gaussian(attributes, q, k, mask) @ v
    scores = q @ k.transposed((0, 1, 3, 2))
    if op_type == "ChebyshevAttention":
        return _chebyshev(attributes, scores, v, mask)
    weights = power(scores, attributes["power"]).masked(mask)
    factor = goldschmidt.start_factor(attributes["ratio_lower"], attributes["ratio_upper"])
    divisor = weights.summed() + attributes["epsilon"] * factor
    return (weights @ v) * goldschmidt.inverse_of_scaled(divisor, attributes["iterations"])


def _chebyshev(attributes: Attributes, scores: GraphValue, v: GraphValue, mask: np.ndarray) -> GraphValue:
    weights = _exponentials(attributes, scores).masked(mask)
    inverse = goldschmidt.inverse_of_scaled(weights.summed(), attributes["iterations"])
    if attributes["halvings"] == 0:
        return (weights @ v) * inverse
    weights = weights * inverse
    factor = goldschmidt.start_factor(attributes["square_lower"], 1.0)
    for index in range(attributes["halvings"]):
        weights = weights * weights
        sums = (weights.summed() * factor).settled()
        inverse = goldschmidt.inverse_of_scaled(sums, attributes["square_iterations"]) * factor
        if index == attributes["halvings"] - 1:
            return (weights @ v) * inverse
        weights = weights * inverse
    raise AssertionError("halvings is at least one")


def _gaussian(attributes: Attributes, q: GraphValue, k: GraphValue, mask: np.ndarray) -> GraphValue:
    q_squares = (q * q).summed()  # [B, heads, S, 1]
    k_squares = (k * k).summed().transposed((0, 1, 3, 2))  # [B, heads, 1, S]
    product = q @ k.transposed((0, 1, 3, 2))
    base = (product + product) - q_squares - k_squares + 1.0
    return squared(base.masked(mask), attributes["squarings"])


def _exponentials(attributes: Attributes, scores: GraphValue) -> GraphValue:
    lower, upper = attributes["domain_lower"], attributes["domain_upper"]
    half, middle = (upper - lower) / 2, (upper + lower) / 2
    unit = scores - (attributes["shift"] + middle) / half
    squarings = attributes["squarings"]
    factor = goldschmidt.start_factor(attributes["ratio_lower"], attributes["ratio_upper"])
    coefficients = np.asarray(attributes["coefficients"]) * factor ** (2.0**-squarings)
    return squared(evaluate(coefficients.tolist(), unit), squarings)


def check_polynomial(op_type: str, attributes: Attributes) -> None:
    exact = op_type == "Attention" or attributes.get("division") == "exact"
    if exact or (op_type == "GaussianAttention" and attributes["squarings"] == 0):
        raise LegalityError(
            f"{op_type} in its exact form is no polynomial; run approximate_softmax after calibrate, for the power variant "
            "with division='goldschmidt' and form lipschitz or length_agnostic"
        )


def rms_norm(attributes: Attributes, x: GraphValue, gain: np.ndarray) -> GraphValue:
    """Expand an RMSNorm; its gain and the constants of the variance stay a factor for the Linear that follows."""
    scale = attributes["variance_scale"]
    lower, upper = attributes["domain_lower"] * scale, attributes["domain_upper"] * scale
    half, middle = (upper - lower) / 2, (upper + lower) / 2
    squares, to_variance, epsilon = (x * x).summed(), scale / int(x.shape[-1]), attributes["epsilon"] * scale  # [B, S, 1]
    unit = (squares * (to_variance / half)).settled() + (epsilon - middle) / half
    start = evaluate(attributes["coefficients"], unit)
    root = newton(start, squares * to_variance + epsilon, attributes["newton_steps"])
    return (x * (root * scale**0.5)).gain(gain)


def series_silu(attributes: Attributes, x: GraphValue) -> GraphValue:
    return evaluate(attributes["coefficients"], (x * (1 / attributes["domain_upper"])).settled())


def composed_silu(attributes: Attributes, x: GraphValue) -> GraphValue:
    bound = attributes["domain_upper"]
    unit = (x * (1 / bound)).settled()
    return (unit * (bound / 2)) * (silu.composed(unit, attributes["coefficients"]) + 1.0)


def rotary(x: GraphValue, cos: np.ndarray, sin: np.ndarray, factor: np.ndarray | None) -> GraphValue:
    """Return x ⊙ cos + rotate_half(x) ⊙ sin with tables [1, S, D], times `factor` [S] where given.

    The sign of rotate_half goes into the table.
    """
    cos, sin = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)  # [1, 1, S, D]
    half = cos.shape[-1] // 2
    sin = np.concatenate([-sin[..., :half], sin[..., half:]], axis=-1)
    if factor is not None:
        cos, sin = cos * factor[:, None], sin * factor[:, None]
    last = len(x.shape) - 1
    swapped = concatenated([x.sliced(last, half, 2 * half), x.sliced(last, 0, half)], last)
    return x.times_array(cos) + swapped.times_array(sin)


def repeat_kv(x: GraphValue, repeats: int) -> GraphValue:
    """Repeat each head: [B, kv, S, D] → [B, kv·repeats, S, D]."""
    batch, heads, length, size = x.shape
    if repeats == 1:
        return x
    apart = x.reshaped((batch, heads, 1, length, size))
    return concatenated([apart] * repeats, 2).reshaped((batch, int(heads) * repeats, length, size))
