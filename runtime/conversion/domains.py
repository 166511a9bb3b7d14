"""From measured ranges to the options of the passes, and the check that held-out text stays within them."""

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
    """The attention's exact function, everything else as it was; `training`: in the form that the first stage has."""
    section = recipe.attention
    if section.variant == EXACT:
        return PolynomialOptions()
    form = (section.training_form if training else None) or section.form
    chosen = ApproximateSoftmax(
        variant=section.variant, power=section.power, form=form, epsilon=section.epsilon, fit=False
    )
    return PolynomialOptions(attention=chosen)


def fitted(recipe: ConversionRecipe, seen: Ranges) -> PolynomialOptions:
    """Every polynomial of the recipe, on domains that are the ranges `seen`, widened by the recipe's margins."""
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
    """The domain of every kind of value, by the kinds of `hecompile.runtime.conversion.ranges`."""
    found = {}
    if (attention := options.attention) is not None:
        if attention.domain_lower is not None:
            found["exponents"] = Interval(attention.domain_lower, 0.0)
        if attention.domain_upper is not None:
            found["scores"] = Interval(-attention.domain_upper, attention.domain_upper)
        if attention.ratio_lower is not None and attention.ratio_upper is not None:
            found["divisors"] = Interval(attention.ratio_lower, attention.ratio_upper)
    if options.norm is not None and options.norm.domain_lower is not None and options.norm.domain_upper is not None:
        found["variances"] = Interval(options.norm.domain_lower, options.norm.domain_upper)
    if options.activation is not None and options.activation.domain_upper is not None:
        found["activation_inputs"] = Interval(-options.activation.domain_upper, options.activation.domain_upper)
    return found


def outside(options: PolynomialOptions, seen: Ranges) -> str:
    """What of the ranges `seen` leaves the domains, with the numbers of every kind; empty where nothing does."""
    return "; ".join(
        f"{kind.replace('_', ' ')} between {seen[kind].lower:.5g} and {seen[kind].upper:.5g}, domain "
        f"[{domain.lower:.5g}, {domain.upper:.5g}]"
        for kind, domain in domains(options).items()
        # Written as a positive statement: a range of NaN is outside of everything.
        if not seen[kind].within(domain.lower, domain.upper)
    )


def check_heldout(options: PolynomialOptions, seen: Ranges) -> None:
    """LegalityError, with the numbers of every kind, where held-out ranges leave the domains."""
    if found := outside(options, seen):
        raise LegalityError(
            f"held-out text leaves the domains of the polynomials: {found}. Nothing was saved. Raise range_loss.alpha or "
            "range_loss.beta, train longer, or raise the margin of that section"
        )


def to_config(options: PolynomialOptions) -> dict[str, dict[str, Any]]:
    """The `hecompile_polynomial` entry of config.json, which `PolynomialOptions.from_config` reads."""
    parts = {"attention": options.attention, "norm": options.norm, "activation": options.activation}
    return {
        name: {key: value for key, value in asdict(part).items() if key != "fit" and value is not None}
        for name, part in parts.items()
        if part is not None
    }
