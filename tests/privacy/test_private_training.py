"""Private training runs: what a step does to the gradient, what it is charged for and when, and what a crash leaves."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hecompile.client_bundle import ClientBundle
from hecompile.errors import HecompileError, InputError, PrivacyError
from hecompile.worker_bundle import WorkerBundle
from runtime.client import EncryptedCausalLM
from runtime.data import PadToBucket, load_examples
from runtime.metrics import read_metrics
from runtime.privacy import trainer as private_trainer
from runtime.privacy.accountant import Mechanism, spent_epsilon
from runtime.privacy.ledger import PrivacyLedger, Subject
from runtime.privacy.recipe import PrivacySection
from runtime.products import CleartextProducts, EncryptedProducts
from runtime.recipe import Recipe, load_recipe
from runtime.train import run_training
from runtime.transports import InProcessTransport
from runtime.worker import Worker
from tests.training.support import BUCKETS, RECORDS, SECRET, make_model, make_recipe, make_tokenizer

TOKENIZER = make_tokenizer()
N = len(RECORDS)
DELTA = 1e-3


def private_recipe(directory: Path, privacy: dict[str, Any], **training: Any) -> Recipe:
    directory.mkdir(exist_ok=True)
    recipe = make_recipe(directory, **{"per_device_train_batch_size": 2, "save_strategy": "no"} | training)
    return recipe.model_copy(update={"privacy": PrivacySection(**{"delta": DELTA} | privacy)})


def everyone(**more: Any) -> dict[str, Any]:
    """Settings in which each step takes all examples."""
    return {"per_device_train_batch_size": 2, "gradient_accumulation_steps": N // 2, "warmup_steps": 0} | more


@contextmanager
def recorded_gradients() -> Iterator[list[list[Tensor]]]:
    """What each optimizer step was given, in the order of the parameters."""
    steps: list[list[Tensor]] = []

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        group = optimizer.param_groups[0]["params"]
        steps.append([parameter.grad.clone() for parameter in group])

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield steps
    finally:
        handle.remove()


def example_gradients(recipe: Recipe) -> list[list[Tensor]]:
    """The gradient of each example's mean loss, by autograd, one example at a time."""
    model = make_model()
    collate = PadToBucket(BUCKETS, 0)
    found = []
    for item in load_examples(recipe.data.train_file, TOKENIZER, BUCKETS).examples:
        loss = model(**collate([item.item()])).loss
        found.append(list(torch.autograd.grad(loss, list(model.adapter_state().values()))))
    return found


def length(gradient: list[Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in gradient))


def clipped_mean(gradients: list[list[Tensor]], clip: float) -> list[Tensor]:
    scaled = [[part * min(1.0, clip / length(gradient)) for part in gradient] for gradient in gradients]
    return [torch.stack(parts).sum(dim=0) / len(gradients) for parts in zip(*scaled, strict=True)]


def ledger_of(recipe: Recipe) -> PrivacyLedger:
    return PrivacyLedger(
        recipe.data.train_file.with_name("train.jsonl.ledger"), Subject.of_file(recipe.data.train_file, N, DELTA)
    )


def test_a_step_is_the_mean_of_clipped_gradients(tmp_path: Path) -> None:
    recipe = private_recipe(tmp_path, {"noise_multiplier": 0}, **everyone(max_steps=1))
    gradients = example_gradients(recipe)
    lengths = sorted(length(gradient) for gradient in gradients)
    clip = lengths[N // 2]  # half of them are clipped
    recipe = private_recipe(tmp_path, {"noise_multiplier": 0, "max_grad_norm": clip}, **everyone(max_steps=1))
    with recorded_gradients() as steps:
        result = run_training(make_model(), TOKENIZER, recipe)
    for own, expected in zip(steps[0], clipped_mean(gradients, clip), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-7)
    assert result.privacy is not None and "epsilon inf at delta 0.001 spent by 1 releases" in result.privacy


def test_its_noise_has_the_promised_size(tmp_path: Path) -> None:
    """1536 numbers in each of two steps: within 7 standard deviations of the variance's estimate, failing below 1e-11."""
    clip, noise = 0.3, 2.0
    recipe = private_recipe(tmp_path, {"noise_multiplier": noise, "max_grad_norm": clip}, **everyone(max_steps=2))
    # No update, so that both steps have the same gradient.
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"learning_rate": 1e-30})})
    exact = clipped_mean(example_gradients(recipe), clip)
    with recorded_gradients() as steps:
        run_training(make_model(), TOKENIZER, recipe)
    noises = [torch.cat([(own - mean).flatten() for own, mean in zip(step, exact, strict=True)]) for step in steps]
    count = len(noises[0])
    for drawn in noises:
        variance = float(drawn.double().square().mean()) / (noise * clip / N) ** 2
        assert abs(variance - 1) < 7 * math.sqrt(2 / count)
    correlation = float(torch.corrcoef(torch.stack(noises))[0, 1])
    assert abs(correlation) < 7 / math.sqrt(count)


def test_micro_batches_in_flight_change_nothing(bundles: tuple[ClientBundle, WorkerBundle], tmp_path: Path) -> None:
    adapters = []
    for number, flight in enumerate((1, 3)):
        settings = everyone(max_steps=2, micro_batches_in_flight=flight)
        recipe = private_recipe(tmp_path / str(number), {"noise_multiplier": 0, "max_grad_norm": 0.2}, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = EncryptedCausalLM(bundles[0], CleartextProducts(*bundles), seed=1)
        run_training(model, TOKENIZER, recipe)
        adapters.append(model.adapter_state())
    for name, value in adapters[0].items():
        assert torch.equal(value, adapters[1][name]), name


def test_through_the_encrypted_worker_it_keeps_to_its_budget(
    bundles: tuple[ClientBundle, WorkerBundle], tmp_path: Path
) -> None:
    recipe = private_recipe(tmp_path, {"epsilon": 8.0}, max_steps=3, gradient_accumulation_steps=2)
    products = EncryptedProducts(bundles[0], InProcessTransport(Worker(bundles[1], "torch")))
    model = EncryptedCausalLM(bundles[0], products)
    before = {name: value.detach().clone() for name, value in model.adapter_state().items()}
    result = run_training(model, TOKENIZER, recipe)
    assert result.steps == 3 and model.stats()["bytes_up"] > 0
    assert any(not torch.equal(value, before[name]) for name, value in model.adapter_state().items())
    with ledger_of(recipe) as ledger:
        assert ledger.releases == 3 and 7.9 < ledger.spent() <= 8.0
        ((mechanism, _),) = ledger.history
        assert mechanism.sampling_rate == 0.4
    assert result.privacy is not None and f"noise multiplier {mechanism.noise_multiplier:.4g}" in result.privacy


def test_a_release_is_entered_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    recipe = private_recipe(tmp_path, {"noise_multiplier": 1.0})
    monkeypatch.setattr(private_trainer, "add_noise", crash)
    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        run_training(model, TOKENIZER, recipe)
    with ledger_of(recipe) as ledger:
        assert ledger.releases == 1
    # What fails before anything could be released costs nothing.
    monkeypatch.setattr(private_trainer, "clipped_sum", crash)
    with pytest.raises(KeyboardInterrupt):
        run_training(model, TOKENIZER, private_recipe(tmp_path, {"noise_multiplier": 1.0}, **everyone()))
    with ledger_of(recipe) as ledger:
        assert ledger.releases == 1
    assert all(torch.equal(value, make_model().adapter_state()[name]) for name, value in model.adapter_state().items())


def test_a_resumed_run_pays_for_the_steps_that_the_crash_took_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = private_recipe(tmp_path, {"epsilon": 3.0}, max_steps=6, save_strategy="steps", save_steps=3)
    real = private_trainer.PrivateTrainer._spend

    def killed(self: Any) -> None:
        real(self)
        if self.state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(private_trainer.PrivateTrainer, "_spend", killed)
    with pytest.raises(KeyboardInterrupt):
        run_training(make_model(), TOKENIZER, recipe)
    monkeypatch.undo()
    with ledger_of(recipe) as ledger:
        assert ledger.releases == 5
        first = ledger.last
    result = run_training(make_model(), TOKENIZER, recipe, resume=True)
    assert result.steps == 6
    with ledger_of(recipe) as ledger:
        assert ledger.releases == 8  # 5, and steps 4 to 6
        assert first is not None and ledger.last is not None
        assert ledger.last.noise_multiplier > first.noise_multiplier
        assert 2.97 < ledger.spent() <= 3.0
    records = [record["step"] for record in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in record]
    assert records == [1, 2, 3, 4, 5, 6]


def test_a_run_resumed_without_loss_keeps_its_noise(tmp_path: Path) -> None:
    recipe = private_recipe(tmp_path, {"epsilon": 3.0}, max_steps=4, save_strategy="steps", save_steps=2)
    run_training(make_model(), TOKENIZER, recipe)
    path = tmp_path / "train.jsonl.ledger"
    path.write_bytes((tmp_path / "run/checkpoint-2/privacy_ledger.jsonl").read_bytes())  # as if step 3 had not begun
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    run_training(make_model(), TOKENIZER, recipe, resume=True)
    with ledger_of(recipe) as ledger:
        assert [count for _, count in ledger.history] == [4]


def test_a_promise_cannot_be_dropped_taken_up_or_forgotten_halfway(tmp_path: Path) -> None:
    private = private_recipe(tmp_path, {"noise_multiplier": 1.0}, max_steps=2, save_strategy="steps", save_steps=2)
    run_training(make_model(), TOKENIZER, private)
    longer = private.model_copy(update={"training": private.training.model_copy(update={"max_steps": 4})})
    with pytest.raises(PrivacyError, match="was trained with differential privacy; steps without it would void"):
        run_training(make_model(), TOKENIZER, longer.model_copy(update={"privacy": None}), resume=True)
    (tmp_path / "train.jsonl.ledger").unlink()
    with pytest.raises(PrivacyError, match=r"does not hold all that .*checkpoint-2/privacy_ledger"):
        run_training(make_model(), TOKENIZER, longer, resume=True)
    plain = make_recipe(tmp_path, max_steps=2, save_steps=2, overwrite_output_dir=True)
    run_training(make_model(), TOKENIZER, plain)
    with pytest.raises(PrivacyError, match="was trained without differential privacy"):
        run_training(make_model(), TOKENIZER, longer, resume=True)


def test_every_run_on_a_dataset_spends_from_one_budget(tmp_path: Path) -> None:
    recipe = private_recipe(tmp_path, {"epsilon": 2.0}, max_steps=3)
    run_training(make_model(), TOKENIZER, recipe)
    again = recipe.model_copy(update={"training": recipe.training.model_copy(update={"output_dir": tmp_path / "b"})})
    with pytest.raises(
        InputError, match=r"epsilon 2\.0 \(delta 0\.001\), of which .* is spent .*nothing of their gradient"
    ):
        run_training(make_model(), TOKENIZER, again)
    fixed = again.model_copy(update={"privacy": PrivacySection(epsilon=2.5, noise_multiplier=1.5, delta=DELTA)})
    long = fixed.training.model_copy(update={"max_steps": 60})
    with pytest.raises(InputError, match=r"allows \d+ of the run's 60 steps at noise multiplier 1\.5; take fewer"):
        run_training(make_model(), TOKENIZER, fixed.model_copy(update={"training": long}))
    assert not (tmp_path / "b").exists()
    with ledger_of(recipe) as ledger:
        assert ledger.releases == 3


def test_an_empty_sample_is_a_step_of_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.privacy.sampling.poisson_sample", lambda *_: [])
    for mode in ("strict", "paper"):
        recipe = private_recipe(tmp_path / mode, {"noise_multiplier": 1.0, "mode": mode}, max_steps=2)
        with recorded_gradients() as steps:
            run_training(make_model(), TOKENIZER, recipe)
        expected = 1.0 / 2 if mode == "strict" else 1.0
        for step in steps:
            flat = torch.cat([part.flatten() for part in step])
            assert abs(float(flat.std()) / expected - 1) < 0.2
        records = [record for record in read_metrics(tmp_path / mode / "run/metrics.jsonl") if "loss" in record]
        assert [record["loss"] for record in records] == [0.0, 0.0]


def test_the_published_algorithm_and_what_it_really_gives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clip = 0.01
    privacy = {"mode": "paper", "noise_multiplier": 0, "max_grad_norm": clip}
    recipe = private_recipe(tmp_path, privacy, **everyone(max_steps=1))
    with recorded_gradients() as steps:
        model = make_model()
        run_training(model, TOKENIZER, recipe)
    names = list(model.adapter_state())
    for kind in (".lora_A.", ".lora_B."):
        parts = [part for name, part in zip(names, steps[0], strict=True) if kind in name]
        assert parts and length(parts) == pytest.approx(clip, rel=1e-4)

    recipe = private_recipe(tmp_path / "b", {"mode": "paper", "epsilon": 2.0}, max_steps=5)
    result = run_training(make_model(), TOKENIZER, recipe)
    sigma = math.sqrt(2 * math.log(1.25 / DELTA)) / 2.0
    with ledger_of(recipe) as ledger:
        assert dict(ledger.history) == {Mechanism(sigma / math.sqrt(8), 0.2): 5}
        really = ledger.spent()
    assert really > 2 * 2.0
    unsampled = spent_epsilon([(Mechanism(sigma / math.sqrt(8), 1.0), 5)], DELTA)
    assert result.privacy is not None
    for text in (
        "mode paper",
        "epsilon 2 per iteration",
        f"really epsilon {really:.4g}",
        f"{unsampled:.4g} for batches",
    ):
        assert text in result.privacy
    assert f"really spend {really:.4g}" in caplog.text


def test_nothing_of_the_data_is_in_the_ledger(tmp_path: Path) -> None:
    recipe = private_recipe(tmp_path, {"noise_multiplier": 1.0}, max_steps=1)
    run_training(make_model(), TOKENIZER, recipe)
    text = (tmp_path / "train.jsonl.ledger").read_text()
    assert SECRET not in text
    assert json.loads(text.splitlines()[1])["note"] == "step 1"


def test_a_gradient_that_is_not_finite_is_neither_released_nor_paid_for(tmp_path: Path) -> None:
    model = make_model()
    real = model.per_example_gradients

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        next(iter(found.gradients.values()))[0, 0, 0] = float("inf")
        return found

    model.per_example_gradients = poisoned  # type: ignore[method-assign]
    recipe = private_recipe(tmp_path, {"noise_multiplier": 1.0}, **everyone(max_steps=1))
    with pytest.raises(HecompileError, match="is not finite for an example; the step was not taken"):
        run_training(model, TOKENIZER, recipe)
    with ledger_of(recipe) as ledger:
        assert ledger.releases == 0


@pytest.mark.parametrize(
    ("privacy", "training", "message"),
    [
        ({"epsilon": 1.0, "delta": 0.1}, {}, "with 10 examples it must be below 1/10"),
        (
            {"epsilon": 1.0},
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
            "12 examples .* only 10",
        ),
        ({"noise_multiplier": 0.01}, {}, r"noise multiplier 0\.01 is outside"),
    ],
)
def test_what_promises_nothing_is_refused_before_anything_is_written(
    tmp_path: Path, privacy: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_training(make_model(), TOKENIZER, private_recipe(tmp_path, privacy, **training))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("epsilon: 1", "key privacy.delta is missing"),
        ("delta: 1e-5", "privacy: give epsilon, and the noise is calibrated, or noise_multiplier"),
        ("epsilon: -1\n  delta: 1e-5", "privacy.epsilon: Input should be greater than 0"),
        ("epsilon: 1\n  delta: 2", "privacy.delta: Input should be less than 1"),
        ("epsilom: 1\n  delta: 1e-5", r"unknown key privacy\.epsilom; did you mean privacy\.epsilon\?"),
        ("mode: paper\n  epsilon: 1\n  noise_multiplier: 1\n  delta: 1e-5", "not both"),
        ("mode: loose\n  epsilon: 1\n  delta: 1e-5", r"privacy\.mode: Input should be 'strict' or 'paper'"),
    ],
)
def test_a_wrong_section_is_one_clear_error(tmp_path: Path, section: str, message: str) -> None:
    text = "model: c\nworker: tcp://127.0.0.1:1\ndata: {train_file: t.jsonl}\ntraining: {output_dir: o}\n"
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{text}privacy:\n  {section}\n")
    with pytest.raises(InputError, match=message):
        load_recipe(path)
    path.write_text(f"{text}privacy: {{epsilon: 2, delta: 1.0e-5, ledger: l}}\n")
    loaded = load_recipe(path, ["privacy.noise_multiplier=1.5"]).privacy
    assert loaded is not None and loaded.ledger == tmp_path / "l" and loaded.mode == "strict"
    assert (loaded.epsilon, loaded.noise_multiplier) == (2, 1.5)
