"""Choose which parts of a model are replaced by polynomials: by name, by options, or as its checkpoint says.

A checkpoint that was converted for them says so in its config.json:

    "hecompile_polynomial": {"attention": {"variant": "power", …}, "norm": {…}, "activation": {…}}

with the fields of `ApproximateSoftmax`, `ApproximateRMSNorm` and `ApproximateSiLU`; a missing part stays as it is. An
activation may be a table of few bits (`QuantizeActivation`) instead of a polynomial, chosen by name at export.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, cast

from hecompile.checkpoint.configuration import POLYNOMIAL_KEY, family_of
from hecompile.checkpoint.families import FAMILIES
from hecompile.errors import InputError, LegalityError
from hecompile.passes.approximation.approximate_rmsnorm import ApproximateRMSNorm
from hecompile.passes.approximation.approximate_silu import ApproximateSiLU
from hecompile.passes.approximation.approximate_softmax import ApproximateSoftmax
from hecompile.passes.approximation.quantize_activation import QuantizeActivation
from hecompile.polynomial.names import EXACT, current_name

CONFIG_KEY = POLYNOMIAL_KEY
ATTENTIONS = (EXACT, "power", "gaussian_kernel", "chebyshev")
NORMS = (EXACT, "polynomial")
ACTIVATIONS = (EXACT, "polynomial", "composed", "quantized")
POLYNOMIAL_ACTIVATIONS = ("silu", "swish")
"""The activations that polynomials may stand for, which are two names of one."""

_Part = TypeVar("_Part", ApproximateSoftmax, ApproximateRMSNorm, ApproximateSiLU)


@dataclass(frozen=True)
class PolynomialOptions:
    """Hold the pass to run for each part, None for a part that stays exact."""

    attention: ApproximateSoftmax | None = None
    norm: ApproximateRMSNorm | None = None
    activation: ApproximateSiLU | QuantizeActivation | None = None

    def __bool__(self) -> bool:
        return any((self.attention, self.norm, self.activation))

    @property
    def retrained(self) -> bool:
        """Tell whether the model was trained for another function than softmax attention."""
        return self.attention is not None and self.attention.variant != "chebyshev"

    def trained_attention(self) -> ApproximateSoftmax | None:
        """Return the pass for the attention that the model was trained for, without a domain; None where it is softmax."""
        return replace(self.attention, fit=False) if self.attention is not None and self.retrained else None

    @classmethod
    def from_config(cls, config: Any) -> PolynomialOptions:
        """Read the choice from a checkpoint's configuration. Raises InputError for anything malformed."""
        section = getattr(config, CONFIG_KEY, None)
        if section is None:
            return cls()
        parts: dict[str, Any] = {
            "attention": ApproximateSoftmax,
            "norm": ApproximateRMSNorm,
            "activation": ApproximateSiLU,
        }
        if not isinstance(section, Mapping) or section.keys() - parts.keys():
            raise InputError(f"config.json: {CONFIG_KEY} must be an object with the keys {', '.join(parts)}")
        read = {name: _read(f"{CONFIG_KEY}.{name}", parts[name], value) for name, value in section.items()}
        return cls(**cast("dict[str, Any]", read))

    def choosing(
        self,
        attention: str | ApproximateSoftmax | None = None,
        norm: str | ApproximateRMSNorm | None = None,
        activation: str | ApproximateSiLU | QuantizeActivation | None = None,
    ) -> PolynomialOptions:
        """Return these options with other ones for the parts given.

        A part is given by options, or by a name of ATTENTIONS, NORMS, ACTIVATIONS (or one that older versions had for
        "exact"). A name that agrees with these options keeps them. Raises InputError for another name.
        """
        chosen = self
        if attention is not None:
            chosen = replace(chosen, attention=_attention(self.attention, attention))
        if norm is not None:
            chosen = replace(chosen, norm=_norm(self.norm, norm))
        if activation is not None:
            chosen = replace(chosen, activation=_activation(self.activation, activation))
        return chosen


def require_trained(model: str, trained: PolynomialOptions, chosen: PolynomialOptions) -> None:
    """Raise InputError where the attention chosen is another function than the one that the model was trained with.

    `chebyshev` approximates softmax. The forms of one power attention are let pass: which of them is meant, its options say.
    """
    here, wanted = _function(trained), _function(chosen)
    if here != wanted:
        raise InputError(
            f"{model} was trained with {here} attention, and {wanted} is another function: what the model then answers "
            f"means nothing. Train a checkpoint for it by `hecompile convert` (docs/conversion.md); leave out --attention"
            f"{', or take chebyshev' if here == 'softmax' else ''}; or give --unconverted to measure how bad it is"
        )


def _function(options: PolynomialOptions) -> str:
    attention = options.attention
    if attention is None or not options.retrained:
        return "softmax"
    return f"power-{attention.power}" if attention.variant == "power" else attention.variant


def require_polynomial_family(config: Any) -> None:
    """Raise InputError where a model is of a family, or has an activation, for which there are no polynomials."""
    family, activation = family_of(config), getattr(config, "hidden_act", None)
    if not family.polynomials or activation not in POLYNOMIAL_ACTIVATIONS:
        families = ", ".join(each.model_type for each in FAMILIES.values() if each.polynomials)
        raise InputError(
            f"no polynomial stands for the parts of this model (architecture {config.model_type}, activation {activation}); "
            f"supported: {families} with {' or '.join(POLYNOMIAL_ACTIVATIONS)}. Export it without --attention, --norm and "
            "--activation"
        )


def require_polynomials(model: str, chosen: PolynomialOptions) -> None:
    """Raise LegalityError where a part of the model is no polynomial, naming each such part and the option that helps.

    The pass that expands polynomials would stop at the first such node, and knows neither options nor commands.
    """
    exact, remedies = [], []
    if chosen.attention is None:
        exact.append("attention (softmax)")
        remedies.append("--attention chebyshev")
    if chosen.norm is None:
        exact.append("norm (RMSNorm)")
        remedies.append("--norm polynomial")
    if not isinstance(chosen.activation, ApproximateSiLU):
        exact.append("activation (SiLU)" if chosen.activation is None else "activation (a table)")
        remedies.append("--activation polynomial")
    if exact:
        raise LegalityError(
            f"{model}: no polynomial stands for its {', '.join(exact)}, and ciphertexts know sums and products only. Export "
            f"it with {' '.join(remedies)}, or take a checkpoint that `hecompile convert` has trained for polynomials and "
            "that, as a rule, needs fewer levels (docs/conversion.md)"
        )
    attention = chosen.attention
    if attention is not None and attention.variant == "power" and attention.division == "exact":
        raise LegalityError(
            f"{model}: its power attention divides exactly, which is no polynomial. Convert the checkpoint by a recipe with "
            "variant power and division goldschmidt, as models/recipes/convert-power.yaml has it (docs/conversion.md), or "
            "export with --attention chebyshev where the model was trained with softmax"
        )


def _read(where: str, kind: type[_Part], value: object) -> _Part | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InputError(f"config.json: {where} must be an object of options")
    known = {field.name for field in fields(kind)} - {"fit"}
    if unknown := sorted(value.keys() - known):
        raise InputError(
            f"config.json: {where} has the unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}"
        )
    try:
        return kind(**value)
    except TypeError as error:  # a comparison of a text with a number
        raise InputError(f"config.json: {where}: {error}") from error


def _attention(here: ApproximateSoftmax | None, wanted: str | ApproximateSoftmax) -> ApproximateSoftmax | None:
    if isinstance(wanted, ApproximateSoftmax):
        return wanted
    name = _checked("attention", wanted, ATTENTIONS)
    if name == EXACT:
        return None
    return here if here is not None and here.variant == name else ApproximateSoftmax(variant=name)  # type: ignore[arg-type]


def _norm(here: ApproximateRMSNorm | None, wanted: str | ApproximateRMSNorm) -> ApproximateRMSNorm | None:
    if isinstance(wanted, ApproximateRMSNorm):
        return wanted
    return None if _checked("norm", wanted, NORMS) == EXACT else here or ApproximateRMSNorm()


def _activation(
    here: ApproximateSiLU | QuantizeActivation | None, wanted: str | ApproximateSiLU | QuantizeActivation
) -> ApproximateSiLU | QuantizeActivation | None:
    if isinstance(wanted, (ApproximateSiLU, QuantizeActivation)):
        return wanted
    name = _checked("activation", wanted, ACTIVATIONS)
    if name == EXACT:
        return None
    if name == "quantized":
        return here if isinstance(here, QuantizeActivation) else QuantizeActivation()
    form: Literal["series", "composed"] = "series" if name == "polynomial" else "composed"
    return here if isinstance(here, ApproximateSiLU) and here.form == form else ApproximateSiLU(form=form)


def _checked(part: str, wanted: str, choices: tuple[str, ...]) -> str:
    name: str = current_name(part, wanted)
    if name not in choices:
        raise InputError(f"{part} must be one of {', '.join(choices)}, got {wanted!r}")
    return name
