"""Tell which attention, normalisation and activation a compiled plan computes, and whether a recipe means that plan."""

from __future__ import annotations

import onnx_ir as ir

from hecompile.errors import InputError
from hecompile.polynomial.names import EXACT
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.model.adapter import AdapterModel
from hecompile.runtime.recipes.training import Recipe

_NAMES = {
    "attention": {"PowerAttention": "power", "GaussianAttention": "gaussian_kernel", "ChebyshevAttention": "chebyshev"},
    "norm": {"PolynomialRMSNorm": "polynomial"},
    "activation": {"PolynomialSiLU": "polynomial", "ComposedSiLU": "composed", "QuantizedSiLU": "quantized"},
}
"""Operators that stand for each part, with the names that recipes use."""


def functions_of(graph: ir.Model) -> dict[str, str]:
    """Name the "attention", "norm" and "activation" of a plan as recipes do: "exact" where no polynomial stands."""
    operators = {node.op_type for node in graph.graph}
    return {
        part: next((name for operator, name in table.items() if operator in operators), EXACT)
        for part, table in _NAMES.items()
    }


def check_functions(recipe: Recipe, model: AdapterModel) -> None:
    """Raise InputError if a recipe names an attention, norm or activation that the model does not compute, or gives a range
    loss to one without polynomials."""
    if recipe.range_loss is not None and not (isinstance(model, EncryptedCausalLM) and model.has_domains):
        raise InputError("recipe: range_loss is for plans with polynomials, and this model has none; drop it")
    wanted = {part: getattr(recipe, part) for part in _NAMES}
    wanted = {part: name for part, name in wanted.items() if name is not None}
    if not wanted:
        return
    exact = dict.fromkeys(_NAMES, EXACT)
    actual: dict[str, str] = functions_of(model.bundle.graph()) if isinstance(model, EncryptedCausalLM) else exact
    for part, name in wanted.items():
        if name != actual[part]:
            raise InputError(
                f"recipe: {part} is {name} but the model was compiled with {actual[part]}; drop it from the recipe, or "
                "convert the checkpoint (`hecompile convert`) and export it again"
            )
