"""Tell which attention, normalisation and activation a compiled plan computes, and whether a recipe means that plan."""

from __future__ import annotations

import onnx_ir as ir

from hecompile.errors import InputError
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.model.adapter import AdapterModel
from hecompile.runtime.recipes.training import Recipe

_EXACT = {"attention": "softmax", "norm": "rmsnorm", "activation": "silu"}
_POLYNOMIAL = {
    "attention": {
        "PowerAttention": "power", "GaussianAttention": "gaussian_kernel", "ChebyshevAttention": "chebyshev"
    },
    "norm": {"PolynomialRMSNorm": "polynomial"},
    "activation": {"PolynomialSiLU": "polynomial", "ComposedSiLU": "composed", "QuantizedSiLU": "quantized"},
}  # fmt: skip
"""Operators that stand for each part, with the names that recipes use."""


def functions_of(graph: ir.Model) -> dict[str, str]:
    """Name the "attention", "norm" and "activation" of a plan as recipes do: the exact one where no polynomial stands."""
    operators = {node.op_type for node in graph.graph}
    return {
        part: next((name for operator, name in table.items() if operator in operators), _EXACT[part])
        for part, table in _POLYNOMIAL.items()
    }


def check_functions(recipe: Recipe, model: AdapterModel) -> None:
    """Raise InputError if a recipe names an attention, norm or activation that the model does not compute, or gives a range
    loss to one without polynomials."""
    if recipe.range_loss is not None and not (isinstance(model, EncryptedCausalLM) and model.has_domains):
        raise InputError("recipe: range_loss is for plans with polynomials, and this model has none; drop it")
    wanted = {part: name for part in _EXACT if (name := getattr(recipe, part)) is not None}
    if not wanted:
        return
    actual = functions_of(model.bundle.graph()) if isinstance(model, EncryptedCausalLM) else _EXACT
    for part, name in wanted.items():
        if name != actual[part]:
            raise InputError(
                f"recipe: {part} is {name} but the model was compiled with {actual[part]}; drop it from the recipe, or "
                "convert the checkpoint (`hecompile convert`) and export it again"
            )
