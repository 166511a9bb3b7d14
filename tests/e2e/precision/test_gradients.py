"""Compare encrypted gradients and logits with plaintext float32 PEFT, and see what padding and masked rows do."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from hecompile.errors import InputError
from hecompile.models import TINY_LLAMA
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import CleartextProducts
from hecompile.runtime.model.adapter import AdapterModel, save_adapter
from hecompile.runtime.model.head import scored_positions, scored_targets
from tests.e2e.conftest import Build

COSINE = 0.999
"""At four layers. Errors add up over the depth: docs/precision.md has what is left at thirty."""

LOGIT_TOLERANCE = 0.15
"""Largest difference of a logit, with logits of up to about 20: 10-bit weights and noise at 8 effective bits."""


def gradients(model: AdapterModel, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    for parameter in model.adapter_state().values():
        parameter.grad = None
    output = model(**batch)
    assert output.loss is not None
    output.loss.backward()
    collected = {}
    for name, parameter in model.adapter_state().items():
        assert parameter.grad is not None, name
        collected[name] = parameter.grad.clone()
    return output.loss.item(), collected


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_every_gradient_has_the_direction_of_the_float_one(
    build: Build, batch: dict[str, Tensor], adapter: dict[str, Tensor], engine: str
) -> None:
    encrypted, plain = build.encrypted(engine), build.plaintext()
    encrypted.load_adapter_state(adapter)
    plain.load_adapter_state(adapter)
    loss, own = gradients(encrypted, batch)
    reference_loss, reference = gradients(plain, batch)
    assert abs(loss - reference_loss) < 0.01 * reference_loss
    assert own.keys() == reference.keys() and len(own) == 2 * 7 * 4
    for name, gradient in own.items():
        cosine = float(F.cosine_similarity(gradient.flatten(), reference[name].flatten(), dim=0))
        assert cosine >= COSINE, f"{name}: {cosine}"
        ratio = float(gradient.norm() / reference[name].norm())
        assert 0.97 < ratio < 1.03, f"{name}: length ratio {ratio}"


def test_the_cleartext_engine_warns_and_differs_by_noise_alone(
    build: Build, batch: dict[str, Tensor], adapter: dict[str, Tensor]
) -> None:
    with pytest.warns(UserWarning, match="NOTHING IS ENCRYPTED"):
        clear = EncryptedCausalLM(build.client, CleartextProducts(build.client, build.worker))
    encrypted = build.encrypted()
    for model in (clear, encrypted):
        model.load_adapter_state(adapter)
    _, exact = gradients(clear, batch)
    _, exact_again = gradients(clear, batch)
    _, noisy = gradients(encrypted, batch)
    for name, gradient in exact.items():
        assert torch.equal(gradient, exact_again[name]), name
        assert not torch.equal(gradient, noisy[name]), f"{name}: encryption adds noise, yet nothing changed"
        assert float((gradient - noisy[name]).norm() / gradient.norm()) < 0.05, name


def test_padding_is_not_sent_and_changes_nothing(
    build: Build, batch: dict[str, Tensor], adapter: dict[str, Tensor]
) -> None:
    model = cleartext(build)
    model.load_adapter_state(adapter)
    wider = {  # the same batch in the next bucket
        "input_ids": F.pad(batch["input_ids"], (0, 16)),
        "attention_mask": F.pad(batch["attention_mask"], (0, 16)),
        "labels": F.pad(batch["labels"], (0, 16), value=-100),
    }
    narrow_loss, narrow = gradients(model, batch)
    wide_loss, wide = gradients(model, wider)
    assert wide_loss == pytest.approx(narrow_loss, rel=1e-6)
    for name, gradient in narrow.items():
        torch.testing.assert_close(gradient, wide[name], rtol=1e-4, atol=1e-7, msg=name)


def test_rows_sent_are_the_real_tokens_and_masked_gradients_come_back_as_exact_zeros(
    build: Build, batch: dict[str, Tensor]
) -> None:
    model = build.encrypted()
    sent: dict[str, int] = {}
    product = model.products.product

    def counting(circuit: str, x: Tensor, **scales: Tensor) -> Tensor:
        result = product(circuit, x, **scales)
        zero = x.eq(0).all(dim=1)
        assert bool(result[zero].eq(0).all()), f"{circuit}: a row of zeros came back as noise"
        sent[circuit] = int((~zero).sum())
        return result

    model.products.product = counting  # type: ignore[method-assign]
    gradients(model, batch)
    # The last token of a row is scored by the one before it and predicts nothing.
    tokens = int(batch["attention_mask"].sum()) - len(batch["attention_mask"])
    scored = int((batch["labels"][:, 1:] != -100).sum())
    assert scored < tokens
    last = "model.layers.3"
    narrowed = {f"{last}.self_attn.o_proj", f"{last}.mlp.gate_proj-up_proj", f"{last}.mlp.down_proj"}
    for circuit, count in sent.items():
        # In the last layer, what follows attention is done for the positions whose next token is scored alone.
        assert count == (scored if circuit.rpartition(".")[0] in narrowed else tokens), circuit
    assert f"{last}.mlp.down_proj.forward" in sent and "model.layers.2.mlp.down_proj.backward" in sent
    # Nothing trainable stands before the first layer's projections: their backward product is not needed.
    assert "model.layers.0.self_attn.q_proj-k_proj-v_proj.backward" not in sent


def cleartext(build: Build) -> EncryptedCausalLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EncryptedCausalLM(build.client, CleartextProducts(build.client, build.worker))


def test_logits_to_keep_are_those_of_the_whole(build: Build, batch: dict[str, Tensor], adapter: dict[str, Tensor]) -> None:
    model, plain = cleartext(build).eval(), build.plaintext().eval()
    keep = scored_positions(batch["labels"])
    for either in (model, plain):
        either.load_adapter_state(adapter)
        with torch.no_grad():
            whole = either(batch["input_ids"], batch["attention_mask"]).logits
            kept = either(batch["input_ids"], batch["attention_mask"], logits_to_keep=keep).logits
            loss = either(**batch).loss
        assert whole.shape == (*batch["input_ids"].shape, 1024) and kept.shape == (int(keep.sum()), 1024)
        torch.testing.assert_close(kept, whole[keep], rtol=1e-4, atol=1e-4)
        expected = F.cross_entropy(whole[keep], scored_targets(batch["labels"]))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_packed_sequences_do_not_see_each_other(
    build: Build, batch: dict[str, Tensor], adapter: dict[str, Tensor]
) -> None:
    """A batch's loss and gradients are the sums of its rows', each by itself without padding."""
    model = cleartext(build)
    model.load_adapter_state(adapter)
    scored = int((batch["labels"][:, 1:] != -100).sum())
    loss, whole = gradients(model, batch)
    total, parts = 0.0, {name: torch.zeros_like(value) for name, value in whole.items()}
    for row in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][row].sum())
        single = {name: value[row : row + 1, :length] for name, value in batch.items()}
        for parameter in model.adapter_state().values():
            parameter.grad = None
        share = model(**single, num_items_in_batch=scored).loss
        share.backward()
        total += float(share.detach())
        for name, parameter in model.adapter_state().items():
            parts[name] += parameter.grad
    assert total == pytest.approx(loss, rel=1e-5)
    for name, gradient in whole.items():
        # Rows alone or together round differently in float32, and what is then encoded differs by an integer here and there.
        assert float((gradient - parts[name]).norm() / gradient.norm()) < 1e-4, name


def test_padding_on_the_left_and_a_batch_without_tokens_are_refused(build: Build, batch: dict[str, Tensor]) -> None:
    model = cleartext(build)
    with pytest.raises(InputError, match="padding must be on the right"):
        model(batch["input_ids"], batch["attention_mask"].flip(1))
    with pytest.raises(InputError, match="the batch has no token to predict from"):
        model(batch["input_ids"], torch.zeros_like(batch["attention_mask"]))


def test_saved_adapter_gives_the_same_logits_in_peft(
    build: Build,
    batch: dict[str, Tensor],
    adapter: dict[str, Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("saved") / "adapter"
    model = build.encrypted()
    model.load_adapter_state(adapter)
    save_adapter(model, directory)
    base = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32, attn_implementation="eager")
    plain = peft.PeftModel.from_pretrained(base, directory).eval()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        own = model.eval()(batch["input_ids"], batch["attention_mask"]).logits[real]
        other = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[real]
        bare = plain.get_base_model()
        with plain.disable_adapter():
            without = bare(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[real]
    assert float((own - other).abs().max()) < LOGIT_TOLERANCE
    assert float((own - without).abs().max()) > 4 * LOGIT_TOLERANCE, "the adapter makes no difference: nothing was tested"
