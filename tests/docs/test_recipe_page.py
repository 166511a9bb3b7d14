"""Check that docs/recipe.md has exactly the keys, choices and defaults of the models, and that its example is a recipe."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from hecompile.runtime.recipes.privacy import PrivacySection
from hecompile.runtime.recipes.section import Section
from hecompile.runtime.recipes.training import (
    DataSection,
    LoraSection,
    RangeLossSection,
    Recipe,
    TrainingSection,
    load_recipe,
)
from hecompile.runtime.recipes.workplace import ConnectionSection
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "recipe.md"
SECTIONS: dict[str, type[Section]] = {
    "Top level": Recipe,
    "connection": ConnectionSection,
    "data": DataSection,
    "lora": LoraSection,
    "training": TrainingSection,
    "privacy": PrivacySection,
    "range_loss": RangeLossSection,
}


def parts() -> dict[str, str]:
    """Return the text under each heading."""
    found = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def rows(section: str) -> dict[str, list[str]]:
    """Map each key to the other cells of its row."""
    table = [line.strip("| \n").split(" | ") for line in parts()[section].splitlines() if line.startswith("| `")]
    keys = [key.strip("`") for key, *_ in table]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, (cells for _, *cells in table), strict=True))


def choices(annotation: Any) -> set[str]:
    """Return the values of the Literal in an annotation."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return {value for part in get_args(annotation) if not isinstance(part, str) for value in choices(part)}


def members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_table_is_its_model(section: str) -> None:
    fields, documented = SECTIONS[section].model_fields, rows(section)
    assert set(documented) == set(fields)
    for key, (allowed, default, meaning) in documented.items():
        field = fields[key]
        assert meaning, key
        if field.is_required():
            assert default == "required", key
        elif isinstance(field.default, Section):
            assert default == "all defaults" and field.default == type(field.default)(), key
        else:
            expected = None if default == "none" else yaml.safe_load(default.strip("`"))
            wanted = float(expected) if isinstance(field.default, float) and expected is not None else expected
            assert wanted == field.default and (wanted is None) == (field.default is None), key
        if wanted_choices := choices(field.annotation):
            assert set(re.findall(r"`([^`]+)`", allowed)) == wanted_choices, key


def test_every_section_has_a_table() -> None:
    sections = {
        (key, part)
        for key, field in Recipe.model_fields.items()
        for part in members(field.annotation)
        if isinstance(part, type) and issubclass(part, Section)
    }
    assert sections == {(name, model) for name, model in SECTIONS.items() if model is not Recipe}


def test_the_example_is_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(textwrap.dedent(parts()["Example"].split("**Paths**")[0]))
    overrides = ["training.max_steps=20", "worker=[tcp://a:7700,tcp://b:7700]", "lora={r: 8}", "training.warmup_steps=0"]
    recipe = load_recipe(tmp_path / "mine.yaml", [*overrides, "training.learning_rate=1e-3", "data.validation_file=null"])
    assert recipe.data.train_file == tmp_path / "train.jsonl" and recipe.data.validation_file is None
    assert (recipe.training.learning_rate, recipe.training.max_steps, len(recipe.workers)) == (1e-3, 20, 2)


def test_the_names_that_are_missing_are_missing() -> None:
    """Check the names that the page leaves out on purpose."""
    said = re.findall(r"`([a-z0-9_]+)`", parts()["What is not there, and why"])
    assert {"optim", "fp16", "gradient_checkpointing"} <= set(said)
    assert not set(said) & (TrainingSection.model_fields.keys() - {"output_dir"})
