"""Check that the tables of recipes have exactly the keys, choices and defaults of the models, and that the example of
docs/recipe.md is a recipe."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from hecompile.runtime.conversion.recipe import (
    ActivationSection,
    AttentionSection,
    ConversionData,
    ConversionRecipe,
    ConversionTraining,
    NormSection,
)
from hecompile.runtime.federation.protocol.settings import FederationSection, NoiseSection, PruningSection
from hecompile.runtime.federation.recipe import FederationRecipe, LoraShape, OwnerSection
from hecompile.runtime.recipes.prefix import PrefixCacheSection
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

TRAINING: dict[str, type[Section]] = {
    "Top level": Recipe,
    "connection": ConnectionSection,
    "data": DataSection,
    "lora": LoraSection,
    "training": TrainingSection,
    "privacy": PrivacySection,
    "prefix_cache": PrefixCacheSection,
    "range_loss": RangeLossSection,
}
FEDERATION: dict[str, type[Section]] = {
    "Top level": FederationRecipe,
    "owners": OwnerSection,
    "lora": LoraShape,
    "federation": FederationSection,
    "pruning": PruningSection,
    "federation.privacy": NoiseSection,
}
CONVERSION: dict[str, type[Section]] = {
    "Top level": ConversionRecipe,
    "attention": AttentionSection,
    "norm": NormSection,
    "activation": ActivationSection,
    "data": ConversionData,
    "training": ConversionTraining,
}
PAGES = {"recipe": TRAINING, "federation": FEDERATION, "conversion": CONVERSION}


def parts(page: str = "recipe") -> dict[str, str]:
    """Return the text under each heading."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    found = re.split(r"^##+ (.+)$", text, flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def rows(page: str, section: str) -> dict[str, list[str]]:
    """Map each key to the other cells of its row."""
    table = [line.strip("| \n").split(" | ") for line in parts(page)[section].splitlines() if line.startswith("| `")]
    keys = [key.strip("`") for key, *_ in table]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, (cells for _, *cells in table), strict=True))


def choices(annotation: Any) -> set[str]:
    """Return the values of the Literal in an annotation."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return {value for part in get_args(annotation) if not isinstance(part, str) for value in choices(part)}


def members(annotation: Any) -> list[type[Section]]:
    """Return the sections in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [model for part in get_args(annotation) for model in members(part)]


@pytest.mark.parametrize(("page", "section"), [(page, section) for page, models in PAGES.items() for section in models])
def test_a_table_is_its_model(page: str, section: str) -> None:
    fields, documented = PAGES[page][section].model_fields, rows(page, section)
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
            assert set(re.findall(r"`([^`]+)`", allowed)) == {str(one) for one in wanted_choices}, key


@pytest.mark.parametrize("page", PAGES)
def test_every_section_has_a_table(page: str) -> None:
    found, left = set(), [PAGES[page]["Top level"]]
    while left:
        model = left.pop()
        found.add(model)
        left += [part for field in model.model_fields.values() for part in members(field.annotation) if part not in found]
    assert found == set(PAGES[page].values()) | (found & set(TRAINING.values()))  # the pages refer to that one


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
