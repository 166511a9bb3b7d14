"""Check that the pages can be followed one after the other: none exports over what another made, and recipes take it."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from hecompile.runtime.conversion.recipe import load_conversion
from hecompile.runtime.recipes.training import load_recipe
from tests.conftest import ROOT

RECIPES = ROOT / "models" / "recipes"
DEMO = ROOT / "build-demo"
FIRST_RUN = ROOT / "docs" / "first-run.md"  # which has the demo's commands
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [path for path in PAGES if path != FIRST_RUN]


def exports(path: Path) -> set[str]:
    """Return the directories that the commands of a page export to."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return set(re.findall(r"^ {4}hecompile (?:export|ckks export) .*--out (\S+)", text, flags=re.MULTILINE))


def test_the_demo_builds_where_its_recipe_looks() -> None:
    assert exports(FIRST_RUN) == {"build-demo"}
    recipe = load_recipe(RECIPES / "demo.yaml")
    assert recipe.model.resolve() == DEMO / "client"
    assert recipe.worker_bundle is not None and recipe.worker_bundle.resolve() == DEMO / "worker"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_page_builds_or_looks_where_an_installation_builds(path: Path) -> None:
    """`pip install .` puts the package into build/, with which an export would be mixed or which it would refuse."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w/-])build/(client|worker)|--out (build|dist)\b(?!-)", text)


def test_what_the_pages_build_is_neither_committed_nor_left_by_make_clean() -> None:
    clean = re.search(r"^\trm -rf (.*)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert clean is not None and "/build-*" in (ROOT / ".gitignore").read_text().split()
    shipped = {out for path in PAGES for out in exports(path) if not out.isupper()} - {"build-mine"}  # yours
    assert DEMO.name in shipped and shipped <= set(clean[1].split())


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs" / "own-data.md"], ids=lambda path: path.name)
def test_the_example_with_your_own_data_trains_what_it_exports(path: Path, tmp_path: Path) -> None:
    (out,) = exports(path)
    text = path.read_text(encoding="utf-8")
    (block,) = re.findall(r"^    model: .*\n(?:    .+\n)+", text, flags=re.MULTILINE)
    (tmp_path / "mine.yaml").write_text(textwrap.dedent(block))
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.model == tmp_path / out / "client" and recipe.data.train_file == tmp_path / "mine.jsonl"
    adapter = recipe.training.output_dir.relative_to(tmp_path) / "adapter"
    assert f"hecompile worker serve {out}/worker --listen {recipe.worker}" in text
    assert f"hecompile infer {out}/client --worker {recipe.worker} --adapter {adapter} " in text
    assert f'"{adapter}")' in text  # PEFT loads it


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
