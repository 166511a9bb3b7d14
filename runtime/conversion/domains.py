"""Turn measured ranges into the options of the passes, and check that held-out text stays within their domains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.errors import LegalityError
from hecompile.passes.approximation.approximate_rmsnorm import ApproximateRMSNorm
from hecompile.passes.approximation.approximate_silu import ApproximateSiLU
from hecompile.passes.approximation.approximate_softmax import ApproximateSoftmax
from hecompile.polynomial.names import EXACT
from hecompile.polynomial.ranges import Interval
from hecompile.runtime.conversion.recipe import ConversionRecipe

Ranges = Mapping[str, Interval]


def attention_alone(recipe: ConversionRecipe, training: bool = False) -> PolynomialOptions:
    """Return options with the attention's exact function and everything else as it was.

    training: whether to take the form that the first stage trains with.
    """
    section = recipe.attention
    if section.variant == EXACT:
        return PolynomialOptions()
    form = (section.training_form if training else None) or section.form
    chosen = ApproximateSoftmax(
        variant=section.variant, power=section.power, form=form, epsilon=section.epsilon, fit=False
    )
    return PolynomialOptions(attention=chosen)


def fitted(recipe: ConversionRecipe, seen: Ranges) -> PolynomialOptions:
    """Return options for every polynomial of the recipe, with the ranges `seen`, widened by its margins, for domains."""
    return PolynomialOptions(_attention(recipe, seen), _norm(recipe, seen), _activation(recipe, seen))


def _attention(recipe: ConversionRecipe, seen: Ranges) -> ApproximateSoftmax | None:
    section = recipe.attention
    if section.variant == EXACT:
        return None
    common: dict[str, Any] = {"error": section.error, "margin": section.margin, "epsilon": section.epsilon}
    if section.variant == "gaussian_kernel":
        lower = min(seen["exponents"].lower * section.margin, -1.0)
        return ApproximateSoftmax(variant="gaussian_kernel", domain_lower=lower, **common)
    scores, divisors = seen["scores"], seen["divisors"].widened(section.margin)
    goldschmidt = section.division == "goldschmidt"
    return ApproximateSoftmax(
        variant="power",
        power=section.power,
        form=section.form,
        division=section.division,
        domain_upper=max(-scores.lower, scores.upper) * section.margin,
        ratio_lower=max(divisors.lower, section.epsilon) if goldschmidt else None,
        ratio_upper=divisors.upper if goldschmidt else None,
        **common,
    )


def _norm(recipe: ConversionRecipe, seen: Ranges) -> ApproximateRMSNorm | None:
    section = recipe.norm
    if section.form == EXACT:
        return None
    domain = seen["variances"].widened(section.margin)
    return ApproximateRMSNorm(
        error=section.error, margin=section.margin, domain_lower=max(domain.lower, 1e-8), domain_upper=domain.upper
    )


def _activation(recipe: ConversionRecipe, seen: Ranges) -> ApproximateSiLU | None:
    section = recipe.activation
    if section.form == EXACT:
        return None
    inputs = seen["activation_inputs"]
    bound = max(-inputs.lower, inputs.upper) * section.margin
    form: Literal["series", "composed"] = "series" if section.form == "polynomial" else "composed"
    return ApproximateSiLU(form=form, error=section.error, margin=section.margin, domain_upper=bound)


def domains(options: PolynomialOptions) -> dict[str, Interval]:
    """Return the domain of every kind of value, by the kinds of `hecompile.runtime.conversion.ranges.Measured`."""
    by_kind = {}
    if (attention := options.attention) is not None:
        if attention.domain_lower is not None:
            by_kind["exponents"] = Interval(attention.domain_lower, 0.0)
        if attention.domain_upper is not None:
            by_kind["scores"] = Interval(-attention.domain_upper, attention.domain_upper)
        if attention.ratio_lower is not None and attention.ratio_upper is not None:
            by_kind["divisors"] = Interval(attention.ratio_lower, attention.ratio_upper)
    if options.norm is not None and options.norm.domain_lower is not None and options.norm.domain_upper is not None:
        by_kind["variances"] = Interval(options.norm.domain_lower, options.norm.domain_upper)
    if options.activation is not None and options.activation.domain_upper is not None:
        by_kind["activation_inputs"] = Interval(-options.activation.domain_upper, options.activation.domain_upper)
    return by_kind


def describe_violations(options: PolynomialOptions, seen: Ranges) -> str:
    """Describe the ranges that leave their domains, with the numbers of each kind; empty where none does."""
    return "; ".join(
        f"{kind.replace('_', ' ')} between {seen[kind].lower:.5g} and {seen[kind].upper:.5g}, domain "
        f"[{domain.lower:.5g}, {domain.upper:.5g}]"
        for kind, domain in domains(options).items()
        # Written as a positive statement: a range of NaN is outside of everything.
        if not seen[kind].within(domain.lower, domain.upper)
    )


def check_heldout(options: PolynomialOptions, seen: Ranges) -> None:
    """Raise LegalityError, with the numbers of each kind, where held-out ranges leave the domains."""
    if violations := describe_violations(options, seen):
        raise LegalityError(
            f"held-out text leaves the domains of the polynomials: {violations}. Nothing was saved. Raise "
            "range_loss.alpha or range_loss.beta, train longer, or raise the margin of that section"
        )


def to_config(options: PolynomialOptions) -> dict[str, dict[str, Any]]:
    """Return the `hecompile_polynomial` entry of config.json, which `PolynomialOptions.from_config` reads."""
    parts = {"attention": options.attention, "norm": options.norm, "activation": options.activation}
    return {
        name: {key: value for key, value in asdict(part).items() if key != "fit" and value is not None}
        for name, part in parts.items()
        if part is not None
    }
