"""Conversions from end to end: what is saved, how an interrupted one goes on, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hecompile.client_bundle import ClientBundle
from hecompile.compiler import CompileOptions, compile_checkpoint
from hecompile.errors import InputError, LegalityError
from hecompile.frontend import load_checkpoint
from hecompile.polynomial_options import PolynomialOptions
from models import REDUCED_LLAMA
from runtime.conversion.recipe import load_conversion
from runtime.conversion.train import Conversion, convert
from runtime.functions import functions_of
from tests.conversion.support import TEXT, recipe


class Stop(Exception):
    """In place of a kill."""


def stop_at(stage: str, step: int) -> Callable[[str, int, int, float], None]:
    def progress(now: str, done: int, steps: int, loss: float) -> None:
        if (now, done) == (stage, step):
            raise Stop

    return progress


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(recipe(out))
    return out


def test_the_result_is_a_checkpoint_that_says_what_it_was_trained_for(converted: Path) -> None:
    checkpoint = load_checkpoint(str(converted))
    options = PolynomialOptions.from_config(checkpoint.model.config)
    assert options.attention is not None and options.attention.variant == "gaussian_kernel"
    assert options.norm is not None and options.activation is not None
    report = Conversion.read(converted)
    assert report.domains.keys() == {"exponents", "variances", "activation_inputs"}
    for kind, domain in report.domains.items():
        assert report.ranges_heldout[kind].within(domain.lower, domain.upper)
    assert not converted.with_name("out.partial").exists()


def test_it_exports(converted: Path, tmp_path: Path) -> None:
    options = CompileOptions(batch_size=2, sequence_buckets=(14,))
    compile_checkpoint(str(converted), tmp_path / "build", options)
    functions = functions_of(ClientBundle.open(tmp_path / "build" / "client").graph())
    assert functions == {"attention": "gaussian_kernel", "norm": "polynomial", "activation": "polynomial"}


def test_interrupted_twice_it_goes_on_to_the_same_weights(converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wanted = recipe(out)
    for stage, step in (("attention", 3), ("polynomial", 2)):
        with pytest.raises(Stop):
            convert(wanted, stop_at(stage, step))
        assert not out.exists()
    convert(wanted)
    weights, expected = load_file(out / "model.safetensors"), load_file(converted / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_state_of_another_recipe_is_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        convert(recipe(out), stop_at("attention", 2))
    with pytest.raises(InputError, match="another recipe"):
        convert(recipe(out, range_loss={"alpha": 2.0}))
    assert (tmp_path / "out.partial" / "state.pt").is_file()
    (tmp_path / "out.partial" / "state.pt").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="damaged"):
        convert(recipe(out))


def test_text_outside_the_domains_is_refused_with_the_numbers_and_nothing_is_saved(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # One line, seen again and again, and domains without a margin: the weights hardly move, so that every loss is finite and
    # only the other lines can be outside.
    lines = (TEXT / "private-train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "one.jsonl").write_text(lines[0] * 16, encoding="utf-8")
    data = {"train_file": tmp_path / "one.jsonl", "validation_file": TEXT / "private-heldout.jsonl", "length": 14}
    rates = {"learning_rate": 1e-6, "polynomial_learning_rate": 1e-6}
    training = {"steps": 1, "polynomial_steps": 1, "batch_size": 16, "warmup_steps": 0, **rates}
    attention = {"variant": "gaussian_kernel", "margin": 1.0, "error": 1e-2}
    number = r"-?\d+(\.\d+)?"
    with pytest.raises(LegalityError) as caught:
        convert(recipe(out, training=training, data=data, attention=attention))
    assert re.search(f"held-out text leaves the domains.*exponents between {number} and {number}, domain", str(caught.value))
    assert not out.exists()


def test_converting_twice_is_refused(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="converted before"):
        convert(recipe(tmp_path / "again", model=str(converted)))
    with pytest.raises(InputError, match="exists"):
        convert(recipe(converted))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("attention: sigmoid", "attention.variant"),
        ("norm: {form: polynomial, lowest: 1}", "unknown key norm.lowest"),
        ("", "nothing to convert"),
        ("attention: power\ntraining: {steps: 0, polynomial_steps: 0}", "nothing would be trained"),
        ("attention: {variant: power, power: 3}", "attention.power"),
    ],
)
def test_a_recipe_is_refused_by_the_key(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    data = f"data: {{train_file: {TEXT}/public-train.jsonl, validation_file: {TEXT}/public-heldout.jsonl}}"
    path.write_text(f"model: {REDUCED_LLAMA}\nout: out\n{data}\n{lines}\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_conversion(path)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "salt in Ford costs 7 ;"}\n', encoding="utf-8")
    data = {"train_file": short, "validation_file": short, "length": 14}
    with pytest.raises(InputError, match="shorter than one row of 14"):
        convert(recipe(tmp_path / "out", data=data))
