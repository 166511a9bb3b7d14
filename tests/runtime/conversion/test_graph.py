"""Check that the graph that is trained is the model, and that range loss is zero inside the range and pulls into it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from hecompile.compiler.frontend import Checkpoint, export_onnx, load_checkpoint
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.models import REDUCED_LLAMA
from hecompile.runtime.conversion.data import load_rows
from hecompile.runtime.conversion.domains import attention_alone
from hecompile.runtime.conversion.graph import TrainableGraph
from hecompile.runtime.conversion.recipe import ConversionRecipe
from tests.runtime.conversion.support import recipe


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load_checkpoint(str(REDUCED_LLAMA))


@pytest.fixture(scope="module")
def rows(checkpoint: Checkpoint) -> Tensor:
    return load_rows(recipe(Path("unused")).data, checkpoint.tokenizer)[0][:16]


def test_without_a_polynomial_it_is_the_checkpoint_forward_and_backward(checkpoint: Checkpoint, rows: Tensor) -> None:
    graph = TrainableGraph(checkpoint, PolynomialOptions(), recipe(Path("unused")))
    with torch.no_grad():
        expected = checkpoint.model(input_ids=rows).logits
    assert torch.allclose(graph.logits(rows), expected, atol=1e-4)
    graph.loss(rows).backward()
    checkpoint.model.zero_grad()
    checkpoint.model(input_ids=rows, labels=rows).loss.backward()
    wanted = {name: value.grad for name, value in checkpoint.model.named_parameters()}
    assert wanted.keys() == graph.weights.keys()
    for name, weight in graph.weights.items():
        assert weight.grad is not None and wanted[name] is not None
        assert torch.allclose(weight.grad, wanted[name], rtol=1e-3, atol=1e-6), name
    checkpoint.model.zero_grad()


@cache
def exported(checkpoint: Checkpoint) -> ir.Model:
    return export_onnx(checkpoint.model)


def terms(checkpoint: Checkpoint, rows: Tensor, wanted: ConversionRecipe) -> tuple[Tensor, Tensor, TrainableGraph]:
    graph = TrainableGraph(checkpoint, attention_alone(wanted), wanted, exported(checkpoint))
    graph.loss(rows, graph.observer)
    return graph.observer.measured.range_term, graph.observer.measured.variance_term, graph


WIDE: dict[str, Any] = {
    "attention": {"variant": "gaussian_kernel", "bound": 1e6},
    "norm": {"form": "polynomial", "lower": 1e-6, "upper": 1e6},
    "activation": {"form": "polynomial", "bound": 1e6},
}
NARROW: dict[str, Any] = {
    "attention": {"variant": "gaussian_kernel", "bound": 1e-2},
    "norm": {"form": "polynomial", "lower": 0.9, "upper": 1.1},
    "activation": {"form": "polynomial", "bound": 1e-2},
}


def test_inside_the_range_the_terms_and_their_gradients_are_zero(checkpoint: Checkpoint, rows: Tensor) -> None:
    range_term, variance_term, graph = terms(checkpoint, rows, recipe(Path("unused"), **WIDE))
    assert range_term.item() == 0 and variance_term.item() == 0
    (range_term + variance_term).backward()
    assert all(weight.grad is None or not weight.grad.any() for weight in graph.weights.values())


@pytest.mark.parametrize("which", [0, 1])
def test_outside_of_it_descending_a_term_lowers_it(checkpoint: Checkpoint, rows: Tensor, which: int) -> None:
    first = terms(checkpoint, rows, recipe(Path("unused"), **NARROW))
    before, graph = first[which], first[2]
    assert before.item() > 0
    before.backward()
    with torch.no_grad():
        for weight in graph.weights.values():
            if weight.grad is not None:
                weight -= 1e-3 * weight.grad / weight.grad.norm().clamp_min(1e-12)
    graph.loss(rows, graph.observer)
    measured = graph.observer.measured
    assert (measured.range_term, measured.variance_term)[which] < before


@pytest.mark.parametrize("form", ["lipschitz", "length_agnostic"])
def test_the_divisors_of_a_power_attention_are_watched(checkpoint: Checkpoint, rows: Tensor, form: str) -> None:
    section = {"variant": "power", "form": form, "bound": 1e6, "divisor_lower": 1e5, "divisor_upper": 1e6}
    range_term, _, graph = terms(checkpoint, rows, recipe(Path("unused"), **(WIDE | {"attention": section})))
    assert range_term.item() > 1
    assert {"scores", "divisors"} <= graph.observer.measured.seen.keys()


def test_a_recipe_that_cannot_end_in_polynomials_is_refused_before_training(tmp_path: Path) -> None:
    for division in ("goldschmidt", "exact"):
        with pytest.raises(ValueError, match="take form lipschitz or length_agnostic"):
            recipe(tmp_path / "out", attention={"variant": "power", "form": "stable", "division": division})
