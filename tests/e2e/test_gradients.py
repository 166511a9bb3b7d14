"""Encrypted gradients and logits against plaintext float32 PEFT, and the treatment of padding and masked rows."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from models import TINY_LLAMA
from runtime.adapter import AdapterModel, save_adapter
from runtime.client import EncryptedCausalLM
from runtime.products import CleartextProducts
from tests.e2e.conftest import Build

COSINE = 0.999
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
    return float(output.loss), collected


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = EncryptedCausalLM(build.client, CleartextProducts(build.client, build.worker))
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

    def counting(circuit: str, x: Tensor) -> Tensor:
        result = product(circuit, x)
        zero = x.eq(0).all(dim=1)
        assert bool(result[zero].eq(0).all()), f"{circuit}: a row of zeros came back as noise"
        sent[circuit] = int((~zero).sum())
        return result

    model.products.product = counting  # type: ignore[method-assign]
    gradients(model, batch)
    tokens = int(batch["attention_mask"].sum())
    scored = int((batch["labels"][:, 1:] != -100).sum())
    assert scored < tokens
    assert {count for circuit, count in sent.items() if circuit.endswith(".forward")} == {tokens}
    # In the last layer only positions whose next token is scored have a gradient below the output head.
    assert sent["model.layers.3.mlp.down_proj.backward"] == scored
    # Nothing trainable stands before the first layer's projections: their backward product is not needed.
    assert "model.layers.0.self_attn.q_proj-k_proj-v_proj.backward" not in sent


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
