"""Compare gradients per example from one pass with one pass per example: plaintext, the plan in clear, encrypted."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.worker import WorkerBundle
from hecompile.errors import InputError
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import CleartextProducts, EncryptedProducts
from hecompile.runtime.model.adapter import AdapterModel
from hecompile.runtime.model.per_example import GradientCollector, PerExample, PerExampleModel, require_per_example
from hecompile.runtime.transports import InProcessTransport
from hecompile.runtime.worker.worker import Worker
from tests.support.training import make_model

TOLERANCE = 1e-5
ENCODED = 5e-5
"""Where float32 rounds a batch otherwise than its rows, an encoded value differs by a step of its encoding, about 2^-14."""

LENGTHS, PROMPTS = (16, 11, 7, 9), (4, 8, 1, 5)
EXAMPLES = len(LENGTHS)


class FloatProducts(CleartextProducts):
    """Compute the plan's products in float64: nothing is encoded, so that only float32 rounding is left to differ."""

    def product(
        self, circuit: str, x: Tensor, column_scale: Tensor | None = None, row_scale: Tensor | None = None
    ) -> Tensor:
        weight = torch.from_numpy(self._worker_bundle.weight(circuit).copy()).double()
        scaled = x.double() if column_scale is None else x.double() * column_scale.double()
        result = scaled @ weight
        return (result if row_scale is None else result * row_scale.double()).float()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Make four examples of different lengths, of which different parts are scored."""
    tokens = torch.randint(3, 259, (EXAMPLES, 16), generator=torch.Generator().manual_seed(3))
    places = torch.arange(16)[None]
    real = places < torch.tensor(LENGTHS)[:, None]
    labels = tokens.masked_fill(~real | (places < torch.tensor(PROMPTS)[:, None]), -100)
    return {"input_ids": tokens * real, "attention_mask": real.long(), "labels": labels}


def with_adapter(model: AdapterModel) -> AdapterModel:
    """Neither A nor B is zero."""
    generator = torch.Generator().manual_seed(5)
    state = model.adapter_state()
    model.load_adapter_state({n: 0.1 * torch.randn(v.shape, generator=generator) for n, v in state.items()})
    return model


def clear(bundles: tuple[ClientBundle, WorkerBundle], products: type[CleartextProducts]) -> EncryptedCausalLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = EncryptedCausalLM(bundles[0], products(*bundles))
    return with_adapter(model)  # type: ignore[return-value]


def one_by_one(model: AdapterModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss summed over the labels, and per matrix [B, *shape], one example at a time without padding."""
    total, rows = torch.zeros(()), []
    parameters = model.adapter_state()
    for row in range(EXAMPLES):
        single = {name: value[row : row + 1, : LENGTHS[row]] for name, value in batch.items()}
        loss = model(**single, num_items_in_batch=1).loss
        assert loss is not None
        rows.append(torch.autograd.grad(loss, list(parameters.values())))
        total += loss.detach()
    return total, {name: torch.stack(parts) for name, parts in zip(parameters, zip(*rows, strict=True), strict=True)}


def worst(found: PerExample, expected: dict[str, Tensor]) -> float:
    """Largest relative difference, in the Euclidean norm, of an example's gradient of a matrix."""
    assert found.gradients.keys() == expected.keys()
    differences = []
    for name, value in found.gradients.items():
        assert value.shape == expected[name].shape
        for own, other in zip(value, expected[name], strict=True):
            assert float(other.norm()) > 0, name
            differences.append(float((own - other).norm() / other.norm()))
    return max(differences)


@pytest.mark.parametrize(("products", "tolerance"), [(FloatProducts, TOLERANCE), (CleartextProducts, ENCODED)])
def test_on_the_plan_they_equal_a_loop_over_the_examples(
    bundles: tuple[ClientBundle, WorkerBundle], batch: dict[str, Tensor], products: type[CleartextProducts],
    tolerance: float,
) -> None:  # fmt: skip
    model = clear(bundles, products)
    loss, expected = one_by_one(model, batch)
    found = model.per_example_gradients(**batch)
    assert worst(found, expected) <= tolerance
    torch.testing.assert_close(found.loss, loss, rtol=1e-5, atol=0)
    assert found.tokens.tolist() == [length - prompt for length, prompt in zip(LENGTHS, PROMPTS, strict=True)]
    assert all(parameter.grad is None for parameter in model.adapter_state().values())


def test_on_plaintext_peft_they_equal_a_loop_over_the_examples(batch: dict[str, Tensor]) -> None:
    model = make_model()
    loss, expected = one_by_one(model, batch)
    found = model.per_example_gradients(**batch)
    assert worst(found, expected) <= TOLERANCE
    torch.testing.assert_close(found.loss, loss, rtol=1e-5, atol=0)
    before = model(**batch).loss
    again = one_by_one(model, batch)[1]  # the hooks are gone
    assert all(torch.equal(value, again[name]) for name, value in expected.items()) and torch.isfinite(before)


def test_through_encryption_they_differ_by_its_noise(
    bundles: tuple[ClientBundle, WorkerBundle], batch: dict[str, Tensor]
) -> None:
    exact = one_by_one(clear(bundles, FloatProducts), batch)[1]
    transport = InProcessTransport(Worker(bundles[1], "torch").exchange)
    encrypted = with_adapter(EncryptedCausalLM(bundles[0], EncryptedProducts(bundles[0], transport)))
    found = require_per_example(encrypted).per_example_gradients(**batch)
    assert 1e-4 < worst(found, exact) < 0.1


def test_their_sum_is_the_batch_gradient_and_dropout_is_the_same(
    bundles: tuple[ClientBundle, WorkerBundle], batch: dict[str, Tensor]
) -> None:
    for model in (clear(bundles, FloatProducts).train(), make_model(dropout=0.3).train()):
        loss = model(**batch, num_items_in_batch=1, generator=torch.Generator().manual_seed(1)).loss
        expected = torch.autograd.grad(loss, list(model.adapter_state().values()))
        found = model.per_example_gradients(**batch, generator=torch.Generator().manual_seed(1))
        for value, other in zip(found.gradients.values(), expected, strict=True):
            torch.testing.assert_close(value.sum(dim=0), other, rtol=1e-4, atol=1e-5)


def test_means_are_of_each_examples_own_labels_and_an_unscored_example_is_zero(
    bundles: tuple[ClientBundle, WorkerBundle], batch: dict[str, Tensor]
) -> None:
    whole = clear(bundles, FloatProducts).per_example_gradients(**batch)
    batch["labels"][2] = -100
    for model in (clear(bundles, FloatProducts), make_model()):
        found = model.per_example_gradients(**batch)
        counts = found.tokens.tolist()
        assert counts == [12, 3, 0, 4]
        means = found.of_means()
        for name, value in found.gradients.items():
            assert not value[2].any() and not means[name][2].any()
            torch.testing.assert_close(means[name][0], value[0] / 12)
        if isinstance(model, EncryptedCausalLM):
            for name, value in found.gradients.items():  # the others do not notice
                torch.testing.assert_close(value[[0, 1, 3]], whole.gradients[name][[0, 1, 3]], rtol=1e-4, atol=1e-6)


def test_a_collector_goes_by_the_number_of_rows() -> None:
    weight = torch.nn.Parameter(torch.randn(2, 3))
    x, dense = torch.randn(1, 5, 3), torch.randn(1, 3, 3)
    collector = GradientCollector({"w": weight}, [(4, 1), (1, 2)])
    loss = collector.product(x, weight).sum() + 2 * collector.product(dense, weight).sum()
    found = collector.backward(loss, torch.tensor([1, 2]))
    ones = torch.ones(2, 1)
    expected = [ones * (x[0, rows].sum(0) + 2 * dense[0, some].sum(0)) for rows, some in (
        (slice(0, 4), slice(0, 1)), (slice(4, 5), slice(1, 3))
    )]  # fmt: skip
    torch.testing.assert_close(found.gradients["w"], torch.stack(expected))
    assert weight.grad is None


def test_a_model_without_them_is_refused() -> None:
    assert isinstance(make_model(), PerExampleModel)
    with pytest.raises(InputError, match="Linear has no gradients per example"):
        require_per_example(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_a_batch_too_large_for_the_plan_is_refused(
    bundles: tuple[ClientBundle, WorkerBundle], batch: dict[str, Tensor], tmp_path: Path
) -> None:
    doubled = {name: torch.cat([value, value]) for name, value in batch.items()}
    with pytest.raises(InputError, match="a batch of 8 x 16 tokens is larger than the plan's 4 x 32"):
        clear(bundles, FloatProducts).per_example_gradients(**doubled)
