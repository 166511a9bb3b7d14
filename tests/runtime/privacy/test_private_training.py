"""Private training: what a step does to the gradient, what it is charged for, and what is refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.worker import WorkerBundle
from hecompile.errors import InputError
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import CleartextProducts, EncryptedProducts
from hecompile.runtime.model.data import PadToBucket, load_examples
from hecompile.runtime.privacy.accountant import Mechanism, spent_epsilon
from hecompile.runtime.recipes.prefix import PrefixCacheSection
from hecompile.runtime.recipes.training import Recipe, load_recipe
from hecompile.runtime.training.metrics import read_metrics
from hecompile.runtime.training.private_trainer import PadPossiblyEmpty
from hecompile.runtime.training.train import run_training
from hecompile.runtime.transports import InProcessTransport
from hecompile.runtime.worker.worker import Worker
from tests.runtime.privacy.support import DELTA, TOKENIZER, N, everyone, ledger_of, private_recipe
from tests.support.training import BUCKETS, make_model


@contextmanager
def recorded_gradients() -> Iterator[list[list[Tensor]]]:
    """Record what each optimizer step was given, in the order of the parameters."""
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
    """Return the gradient of each example's mean loss, by autograd, one example at a time."""
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


def test_micro_batches_in_flight_change_nothing_nor_does_what_is_kept_of_the_first_layer(
    bundles: tuple[ClientBundle, WorkerBundle], tmp_path: Path
) -> None:
    adapters = []
    for number, (flight, kept) in enumerate(((1, None), (3, None), (3, "1MB"))):
        settings = everyone(max_steps=2, micro_batches_in_flight=flight)
        recipe = private_recipe(tmp_path / str(number), {"noise_multiplier": 0, "max_grad_norm": 0.2}, **settings)
        if kept is not None:
            section = PrefixCacheSection.model_validate({"size": kept, "dtype": "float32"})
            recipe = recipe.model_copy(update={"prefix_cache": section})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = EncryptedCausalLM(bundles[0], CleartextProducts(*bundles), seed=1)
        run_training(model, TOKENIZER, recipe)
        adapters.append(model.adapter_state())
    for name, value in adapters[0].items():
        assert torch.equal(value, adapters[1][name]), name
        torch.testing.assert_close(value, adapters[2][name], rtol=1e-4, atol=1e-6)


def test_an_empty_sample_has_no_examples() -> None:
    assert PadPossiblyEmpty(BUCKETS, 0, with_examples=True)([])["examples"].shape == (0,)


def test_through_the_encrypted_worker_it_keeps_to_its_budget(
    bundles: tuple[ClientBundle, WorkerBundle], tmp_path: Path
) -> None:
    recipe = private_recipe(tmp_path, {"epsilon": 8.0}, max_steps=3, gradient_accumulation_steps=2)
    products = EncryptedProducts(bundles[0], InProcessTransport(Worker(bundles[1], "torch").exchange))
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


def test_an_empty_sample_is_a_step_of_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hecompile.runtime.privacy.sampling.poisson_sample", lambda *_: [])
    for mode in ("strict", "paper"):
        recipe = private_recipe(tmp_path / mode, {"noise_multiplier": 1.0, "mode": mode}, max_steps=2)
        with recorded_gradients() as steps:
            run_training(make_model(), TOKENIZER, recipe)
        expected = 1.0 / 2 if mode == "strict" else 1.0
        for step in steps:
            flat = torch.cat([part.flatten() for part in step])
            assert abs(float(flat.std()) / expected - 1) < 0.2
        records = read_metrics(tmp_path / mode / "run/metrics.jsonl")
        assert [record["step"] for record in records] == [1, 2]


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
