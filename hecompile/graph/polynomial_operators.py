"""Define the operators that encryption can follow: attention, normalisation and activation by sums and products.

* `PowerAttention(q, k, v, bias; scale, power, form, epsilon, delta, division, iterations, ratio_lower, ratio_upper,
  domain_upper, error_bound)`: weights w = m ⊙ t^p of the scores t = q·kᵀ·scale, p even, divided by their sum over the keys:
  form "stable" takes t / (max|m ⊙ t| + δ) for t first (not a polynomial: for training), "lipschitz" does not, and
  "length_agnostic" divides by the mean over the keys that a query sees, then by their number, which is a constant
  (Zimerman et al., arXiv 2410.09457). The divisor is ε + that sum or mean; division "exact" or "goldschmidt".
* `GaussianAttention(q, k, v, bias; scale, squarings, domain_lower, domain_upper, error_bound)`: exp(x)·v of the exponents
  x = -‖q - k‖²·scale/2 with exp(x) ≈ (1 + x/2^k)^(2^k), not divided by anything (Rho et al., arXiv 2410.02486). With
  squarings = 0 exp itself. The mask stands in the exponent: -2^k where a key is not seen, for which the polynomial is zero.
* `ChebyshevAttention(q, k, v, bias; scale, shift, coefficients, squarings, iterations, ratio_lower, ratio_upper, halvings,
  square_iterations, square_lower, domain_lower, domain_upper, error_bound)`: the softmax of (t - shift)/2^halvings, with exp
  by a Chebyshev series squared `squarings` times and division by Goldschmidt; then `halvings` times w ← w²/Σw², which
  makes it the softmax of t (Cho et al., arXiv 2410.11184). The domain is that of t - shift.
* `PolynomialRMSNorm(x, weight; epsilon, variance_scale, coefficients, newton_steps, domain_lower, domain_upper,
  error_bound)`: x·y(v)·weight with v = mean(x²) + ε in the domain and y(v) ≈ 1/√v; the series and the steps see
  v·variance_scale.
* `PolynomialSiLU(x; coefficients, domain_lower, domain_upper, error_bound)`: a Chebyshev series on ±domain_upper.
* `ComposedSiLU(x; coefficients, domain_lower, domain_upper, error_bound)`: x·(1 + s(x))/2 with s composed of odd polynomials
  of degree 7, four coefficients each.

The mask m is exp(bias): 1 where the bias is zero, 0 where it is very negative. With `context.sequences` positions are packed
as for `Attention`, and the bias is not looked at. Outside its domain a polynomial means nothing and may grow without limit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hecompile.approximation import exponential, goldschmidt, silu
from hecompile.approximation.arithmetic import power, squared
from hecompile.approximation.inverse_sqrt import inverse_sqrt
from hecompile.graph.attention_cache import causal_mask
from hecompile.graph.ir import DOMAIN
from hecompile.graph.model_operators import attend_packed
from hecompile.graph.operators import Attributes, Context, operator

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q, k, v, mask) → result [B, heads, S, D]; the mask [.., S, S] holds factors between 0 and 1."""


def _attend(context: Context, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, attend: Attend) -> Tensor:
    """Apply `attend` to each row's sequence, or to each of the packed sequences."""
    if context.sequences is None:
        return attend(q, k, v, torch.exp(bias))

    def attend_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, causal_mask(query.shape[2], key.shape[2]).to(q))

    return attend_packed(context, q, k, v, attend_one)


def attention_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return t = q·kᵀ·scale, [B, heads, S, S]."""
    return (q * scale) @ k.transpose(-1, -2)


def gaussian_exponents(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return -‖q_i - k_j‖²·scale/2, [B, heads, S, S]."""
    squares = q.pow(2).sum(-1, keepdim=True) + k.pow(2).sum(-1).unsqueeze(-2)  # [B, heads, S, S]
    return attention_scores(q, k, scale) - squares * (scale / 2)


def power_weights(t: Tensor, mask: Tensor, attributes: Attributes) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return weights of scores t before division [B, heads, S, S], their divisor [B, heads, S, 1] and a constant factor."""
    if attributes["form"] == "stable":
        t = t / ((t * mask).abs().amax(-1, keepdim=True) + attributes["delta"])
    weights = power(t, attributes["power"]) * mask
    total = weights.sum(-1, keepdim=True)
    if attributes["form"] == "length_agnostic":
        visible = mask.sum(-1, keepdim=True)  # [.., S, 1]
        return weights, total / visible + attributes["epsilon"], 1 / visible
    return weights, total + attributes["epsilon"], 1.0


@operator("PowerAttention", DOMAIN)
def _power_attention(context: Context, attributes: Attributes, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        weights, divisor, factor = power_weights(attention_scores(q, k, attributes["scale"]), mask, attributes)
        if attributes["division"] == "exact":
            return (weights / divisor * factor) @ v
        return (weights @ v) * (_goldschmidt(divisor, attributes) * factor)

    return _attend(context, q, k, v, bias, attend)


def _goldschmidt(divisor: Tensor, attributes: Attributes) -> Tensor:
    lower, upper = attributes["ratio_lower"], attributes["ratio_upper"]
    return goldschmidt.inverse(divisor, lower, upper, attributes["iterations"])


@operator("GaussianAttention", DOMAIN)
def _gaussian_attention(
    context: Context, attributes: Attributes, q: Tensor, k: Tensor, v: Tensor, bias: Tensor
) -> Tensor:
    squarings = attributes["squarings"]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        exponents = gaussian_exponents(q, k, attributes["scale"])
        if squarings == 0:
            return (torch.exp(exponents) * mask) @ v
        base = exponents * 2.0**-squarings + 1.0
        return squared(base * mask, squarings) @ v

    return _attend(context, q, k, v, bias, attend)


@operator("ChebyshevAttention", DOMAIN)
def _chebyshev_attention(
    context: Context, attributes: Attributes, q: Tensor, k: Tensor, v: Tensor, bias: Tensor
) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        shifted = attention_scores(q, k, attributes["scale"]) - attributes["shift"]
        lower, upper = attributes["domain_lower"], attributes["domain_upper"]
        # Masked scores may lie outside the domain; they must not become infinite before they are made zero.
        shifted = torch.where(mask > 0, shifted, upper)
        shrink = 2.0 ** -attributes["halvings"]
        series = (attributes["coefficients"], attributes["squarings"], lower * shrink, upper * shrink)
        weights = exponential.by_series(shifted * shrink, *series) * mask
        if attributes["halvings"] == 0:
            return (weights @ v) * _goldschmidt(weights.sum(-1, keepdim=True), attributes)
        weights = weights * _goldschmidt(weights.sum(-1, keepdim=True), attributes)
        for _ in range(attributes["halvings"]):
            weights = weights * weights
            sums = weights.sum(-1, keepdim=True)
            inverse = goldschmidt.inverse(sums, attributes["square_lower"], 1.0, attributes["square_iterations"])
            weights = weights * inverse
        return weights @ v

    return _attend(context, q, k, v, bias, attend)


@operator("PolynomialRMSNorm", DOMAIN)
def _polynomial_rms_norm(context: Context, attributes: Attributes, x: Tensor, weight: Tensor) -> Tensor:
    scale = attributes["variance_scale"]
    variance = (x * x).mean(-1, keepdim=True) * scale + attributes["epsilon"] * scale  # [.., 1]
    lower, upper = attributes["domain_lower"] * scale, attributes["domain_upper"] * scale
    root = inverse_sqrt(variance, attributes["coefficients"], attributes["newton_steps"], lower, upper)
    return weight * (x * (root * scale**0.5))


@operator("PolynomialSiLU", DOMAIN)
def _polynomial_silu(context: Context, attributes: Attributes, x: Tensor) -> Tensor:
    return silu.by_series(x, attributes["coefficients"], attributes["domain_upper"])


@operator("ComposedSiLU", DOMAIN)
def _composed_silu(context: Context, attributes: Attributes, x: Tensor) -> Tensor:
    return silu.by_composition(x, attributes["coefficients"], attributes["domain_upper"])
