"""Read one word where no polynomial stands for a part, and the words of older recipes and options for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.polynomial.names import current_name
from hecompile.runtime.conversion.recipe import load_conversion
from hecompile.runtime.recipes.training import load_recipe
from tests.conftest import ROOT

FORMER = {"attention": "softmax", "norm": "rmsnorm", "activation": "silu"}
CHOSEN = PolynomialOptions().choosing(attention="chebyshev", norm="polynomial", activation="composed")


@pytest.mark.parametrize(("part", "former"), FORMER.items())
def test_the_former_name_of_a_part_is_exact(part: str, former: str) -> None:
    assert current_name(part, former) == current_name(part, "exact") == "exact"
    others = [name for name in FORMER.values() if name != former]
    assert [current_name(part, name) for name in (*others, "polynomial", None)] == [*others, "polynomial", None]


@pytest.mark.parametrize(("part", "former"), FORMER.items())
def test_options_take_both_names(part: str, former: str) -> None:
    exact = CHOSEN.choosing(**{part: "exact"})
    assert getattr(exact, part) is None and exact == CHOSEN.choosing(**{part: former})


@pytest.mark.parametrize(("part", "former"), FORMER.items())
def test_a_training_recipe_takes_both_names(part: str, former: str) -> None:
    path = ROOT / "models" / "recipes" / "demo.yaml"
    assert load_recipe(path, [f"{part}={former}"]) == load_recipe(path, [f"{part}=exact"])


@pytest.mark.parametrize("written", ["{part}: {name}", "{part}: {{{key}: {name}}}"])
@pytest.mark.parametrize(("part", "former"), FORMER.items())
def test_a_conversion_recipe_takes_both_names(tmp_path: Path, part: str, former: str, written: str) -> None:
    other = "activation: polynomial" if part == "norm" else "norm: polynomial"
    key = "variant" if part == "attention" else "form"
    path = tmp_path / "recipe.yaml"

    def loaded(name: str) -> object:
        lines = ["model: m", "out: out", "data: {train_file: a, validation_file: b}", other]
        path.write_text("\n".join([*lines, written.format(part=part, key=key, name=name)]), encoding="utf-8")
        return load_conversion(path)

    assert loaded(former) == loaded("exact")
