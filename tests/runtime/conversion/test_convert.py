"""Convert from end to end: what is saved, how an interrupted one goes on, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hecompile.bundles.client import ClientBundle
from hecompile.compiler.frontend import export_onnx, load_checkpoint
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.errors import InputError, LegalityError, NotFiniteError
from hecompile.graph.ir import attribute, nodes_of_type
from hecompile.he.random.sampling import PublicSeed
from hecompile.models import REDUCED_LLAMA
from hecompile.passes.approximation.approximate_silu import ApproximateSiLU
from hecompile.runtime.client.functions import functions_of
from hecompile.runtime.conversion import train
from hecompile.runtime.conversion.data import batch_of, load_rows
from hecompile.runtime.conversion.domains import attention_alone
from hecompile.runtime.conversion.graph import TrainableGraph
from hecompile.runtime.conversion.recipe import load_conversion
from hecompile.runtime.conversion.train import Conversion, convert
from tests.runtime.conversion.support import TEXT, recipe

STABLE_FIRST = {
    "attention": {
        "variant": "power", "form": "lipschitz", "training_form": "stable", "epsilon": 0.1, "error": 1e-2, "bound": 4.0,
    },
    "activation": {"form": "composed", "bound": 3.0, "error": 5e-2},
}  # fmt: skip
"""Sections of a recipe that trains first with the stable form, then with the Lipschitz one."""


class Stop(Exception):
    """Stand in for a kill."""


def stop_at(stage: str, step: int) -> Callable[[str, int, int, float], None]:
    def progress(now: str, done: int, steps: int, loss: float) -> None:
        if (now, done) == (stage, step):
            raise Stop

    return progress


@pytest.fixture(scope="module", autouse=True)
def exported_once() -> Iterator[None]:
    """Export the one checkpoint of these conversions once: that is most of what a short one takes."""
    model = export_onnx(load_checkpoint(str(REDUCED_LLAMA)).model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "export_onnx", lambda _: model)
        yield


@dataclass(frozen=True)
class Converted:
    """Hold a checkpoint, what its recipe has besides the one of `tests.runtime.conversion.support`, and what its plan
    computes."""

    out: Path
    changes: Mapping[str, Any]
    functions: Mapping[str, str]
    kinds: frozenset[str]


@pytest.fixture(scope="module", params=["gaussian_kernel", "power"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    out = tmp_path_factory.mktemp("converted") / "out"
    functions = {"attention": request.param, "norm": "polynomial", "activation": "polynomial"}
    if request.param == "gaussian_kernel":
        found = Converted(out, {}, functions, frozenset({"exponents", "variances", "activation_inputs"}))
    else:
        kinds = frozenset({"scores", "divisors", "variances", "activation_inputs"})
        found = Converted(out, STABLE_FIRST, functions | {"activation": "composed"}, kinds)
    convert(recipe(out, **found.changes))
    return found


def test_the_result_is_a_checkpoint_that_says_what_it_was_trained_for(converted: Converted) -> None:
    options = PolynomialOptions.from_config(load_checkpoint(str(converted.out)).model.config)
    assert options.attention is not None and options.attention.variant == converted.functions["attention"]
    assert options.norm is not None and isinstance(options.activation, ApproximateSiLU)
    assert options.activation.form == ("composed" if converted.functions["activation"] == "composed" else "series")
    report = Conversion.read(converted.out)
    assert report.domains.keys() == converted.kinds
    for kind, domain in report.domains.items():
        assert report.ranges_heldout[kind].within(domain.lower, domain.upper)
    assert not converted.out.with_name("out.partial").exists()


def test_it_exports_with_the_form_of_inference(converted: Converted, tmp_path: Path) -> None:
    # Calibration text is drawn from the seed, and text of some leaves the domains of a model converted in so few steps.
    options = CompileOptions(batch_size=2, sequence_buckets=(14,), public_seed=PublicSeed(bytes(32)))
    compile_checkpoint(str(converted.out), tmp_path / "build", options)
    graph = ClientBundle.open(tmp_path / "build" / "client").graph()
    assert functions_of(graph) == converted.functions
    forms = {(attribute(node, "form"), attribute(node, "division")) for node in nodes_of_type(graph, "PowerAttention")}
    assert forms == ({("lipschitz", "goldschmidt")} if converted.functions["attention"] == "power" else set())


def test_the_first_stage_trains_with_the_stable_form(tmp_path: Path) -> None:
    wanted = recipe(tmp_path / "out", **STABLE_FIRST)
    checkpoint = load_checkpoint(wanted.model)
    rows, _ = load_rows(wanted.data, checkpoint.tokenizer)
    losses = []

    def progress(stage: str, step: int, steps: int, loss: float) -> None:
        losses.append(loss)
        raise Stop

    with pytest.raises(Stop):
        convert(wanted, progress)
    batch = batch_of(rows, 0, wanted.training.batch_size, wanted.training.seed)
    stable, lipschitz = (
        TrainableGraph(checkpoint, attention_alone(wanted, training), wanted, train.export_onnx(checkpoint.model))
        for training in (True, False)
    )
    assert losses == [stable.loss(batch).item()] and losses[0] != lipschitz.loss(batch).item()
    # The range loss is the same in both: it is about the form that stays.
    for graph in (stable, lipschitz):
        graph.loss(batch, graph.observer)
    first, second = (graph.observer.measured.seen["divisors"] for graph in (stable, lipschitz))
    assert first.upper > 14 + 0.1, "divisors of the stable form are at most one per key and epsilon"
    assert second.upper > 14 + 0.1


def test_interrupted_twice_it_goes_on_to_the_same_weights(converted: Converted, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wanted = recipe(out, **converted.changes)
    for stage, step in (("attention", 3), ("polynomial", 2)):
        with pytest.raises(Stop):
            convert(wanted, stop_at(stage, step))
        assert not out.exists()
    convert(wanted)
    weights, expected = load_file(out / "model.safetensors"), load_file(converted.out / "model.safetensors")
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
    training = {"steps": 1, "polynomial_steps": 1, "polynomial_learning_rate": 3e-2, "warmup_steps": 0}
    loose = {"alpha": 0.0, "beta": 0.0}
    narrow = {"form": "polynomial", "margin": 1.0, "error": 0.3}
    with pytest.raises(LegalityError, match=r"held-out text leaves the domains.*variances between .*, domain \["):
        convert(recipe(out, training=training, range_loss=loose, norm=narrow))
    assert not out.exists()


def test_a_loss_that_is_not_finite_names_the_ranges_and_keeps_the_state(tmp_path: Path) -> None:
    out = tmp_path / "out"
    training = {"steps": 1, "polynomial_steps": 20, "polynomial_learning_rate": 3.0, "warmup_steps": 0, "save_steps": 1}
    loose = {"alpha": 0.0, "beta": 0.0}
    with pytest.raises(
        NotFiniteError, match=r"step \d+ of the stage 'polynomial': the loss is .*variances between .*, domain \["
    ):
        convert(recipe(out, training=training, range_loss=loose))
    assert not out.exists() and (tmp_path / "out.partial" / "state.pt").is_file()


def test_converting_twice_is_refused(converted: Converted, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="converted before"):
        convert(recipe(tmp_path / "again", model=str(converted.out)))
    with pytest.raises(InputError, match="exists"):
        convert(recipe(converted.out))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("attention: sigmoid", "attention.variant"),
        ("norm: {form: polynomial, lowest: 1}", "unknown key norm.lowest"),
        ("", "nothing to convert"),
        ("attention: power\ntraining: {steps: 0, polynomial_steps: 0}", "nothing would be trained"),
        ("attention: {variant: power, power: 3}", "attention.power"),
        ("attention: {variant: gaussian_kernel, training_form: stable}", "gaussian_kernel has one form only"),
        ("attention: {variant: power, training_form: lipschitz}", "attention.training_form"),
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


@pytest.mark.parametrize("foreign", ["out.partial/mine.txt", "out.partial"])
def test_what_is_in_the_way_is_not_deleted(tmp_path: Path, foreign: str) -> None:
    mine = tmp_path / foreign
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(InputError, match="is in the way"):
        convert(recipe(tmp_path / "out"))
    assert mine.read_text() == "mine"
