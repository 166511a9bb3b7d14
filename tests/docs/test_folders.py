"""The documents can be followed one after the other: none exports over what another made, and recipes take what it made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hecompile.runtime.conversion.recipe import load_conversion
from hecompile.runtime.recipes.training import load_recipe
from tests.conftest import ROOT

RECIPES = ROOT / "models" / "recipes"
DEMO = ROOT / "build"
OTHERS = sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "usage.md")  # usage.md has the demo's commands


def exports(path: Path) -> set[str]:
    """Where the commands of a document export to."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return set(re.findall(r"^ {4}hecompile (?:export|ckks export) .*--out (\S+)", text, flags=re.MULTILINE))


def test_the_demo_builds_where_its_recipe_looks() -> None:
    assert exports(ROOT / "README.md") == exports(ROOT / "docs" / "usage.md") == {"build"}
    assert load_recipe(RECIPES / "demo.yaml").model.resolve() == DEMO / "client"


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.name)
def test_no_other_document_exports_over_the_demos_build_or_into_it(path: Path) -> None:
    for out in exports(path):
        assert DEMO not in (ROOT / out, *(ROOT / out).parents)


def test_the_private_recipe_takes_what_privacy_md_exports() -> None:
    (out,) = exports(ROOT / "docs" / "privacy.md")
    recipe = load_recipe(RECIPES / "private.yaml")
    assert recipe.model.resolve() == ROOT / out / "client"
    assert recipe.worker_bundle is not None and recipe.worker_bundle.resolve() == ROOT / out / "worker"
    assert f"--out {out} " in (RECIPES / "private.yaml").read_text()


def test_converted_checkpoints_are_where_conversion_md_takes_them_and_in_no_build() -> None:
    text = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")
    outs = {path.name: load_conversion(path).out.resolve() for path in RECIPES.glob("convert-*.yaml")}
    assert len(outs) == 3 and not any(out.is_relative_to(DEMO) for out in outs.values())
    assert f"--model {outs['convert-gaussian.yaml'].relative_to(ROOT)} " in text
    (build,) = exports(ROOT / "docs" / "conversion.md")
    for half in ("model={}/client", "worker_bundle={}/worker"):
        assert half.format(build) in text
