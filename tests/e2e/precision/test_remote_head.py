"""Compare a model whose worker multiplies by the output head, in parts of the vocabulary, with plaintext PEFT."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler import pipeline
from hecompile.compiler.linear import compile_checkpoint
from hecompile.errors import InputError
from hecompile.graph.attention_cache import AttentionCache
from hecompile.passes.offload.cut_wide import CutWide
from hecompile.runtime.client import output_head
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import EncryptedProducts
from hecompile.runtime.model.adapter import AdapterModel
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.transports import InProcessTransport
from hecompile.runtime.worker.worker import Worker
from tests.support.tiny import OPTIONS, save_checkpoint

PARTS = ("lm_head.part0", "lm_head.part1", "lm_head.part2")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[EncryptedCausalLM, PlaintextPeftModel]:
    """Compile the tests' Llama of 259 tokens with a head of three parts."""
    directory = tmp_path_factory.mktemp("remote-head")
    checkpoint = save_checkpoint(directory / "checkpoint")
    options = dataclasses.replace(OPTIONS, effective_bits=11, weight_bits=12, head="remote")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "CutWide", partial(CutWide, most=100, part=100))
        compile_checkpoint(str(checkpoint), directory / "build", options)
    client = ClientBundle.open(directory / "build" / CLIENT)
    worker = WorkerBundle.open(directory / "build" / WORKER)
    transport = InProcessTransport(Worker(worker, "onnxruntime").exchange)
    encrypted = EncryptedCausalLM(client, EncryptedProducts(client, transport))
    plain = PlaintextPeftModel.from_pretrained(checkpoint, encrypted.peft_config, (8, 16), 2)
    generator = torch.Generator().manual_seed(3)
    state = {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in plain.adapter_state().items()}
    for model in (encrypted, plain):
        model.load_adapter_state(state)
    return encrypted, plain


def batch() -> dict[str, Tensor]:
    """Draw two sequences of 12 tokens, the first three of which score nothing."""
    tokens = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(5))
    labels = tokens.clone()
    labels[:, :4] = -100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def loss_and_gradients(model: AdapterModel) -> tuple[float, dict[str, Tensor]]:
    loss = model(**batch()).loss
    assert loss is not None
    state = model.adapter_state()
    return loss.item(), dict(zip(state, torch.autograd.grad(loss, list(state.values())), strict=True))


def test_loss_gradients_and_digest_are_those_of_plaintext(
    models: tuple[EncryptedCausalLM, PlaintextPeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypted, plain = models
    assert encrypted.digest == plain.digest
    asked: list[tuple[str, int]] = []
    product = encrypted.products.product

    def listening(circuit: str, x: Tensor, **scales: Tensor) -> Tensor:
        asked.append((circuit, len(x)))
        return product(circuit, x, **scales)

    monkeypatch.setattr(encrypted.products, "product", listening)
    loss, own = loss_and_gradients(encrypted)
    expected, reference = loss_and_gradients(plain)
    assert abs(loss - expected) < 1e-3 * expected
    for name, gradient in own.items():
        assert float(F.cosine_similarity(gradient.flatten(), reference[name].flatten(), dim=0)) >= 0.999, name
        assert 0.99 < float(gradient.norm() / reference[name].norm()) < 1.01, name
    # The scored positions alone are sent, 8 of each sequence.
    heads = [request for request in asked if request[0].startswith("lm_head")]
    forward, backward = [f"{part}.forward" for part in PARTS], [f"{part}.backward" for part in PARTS[::-1]]
    assert heads == [(circuit, 16) for circuit in forward + backward]


def test_pieces_of_rows_give_the_same_loss(
    models: tuple[EncryptedCausalLM, PlaintextPeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypted, plain = models
    heads = [(part, torch.ones(2**15)) for part in PARTS]
    assert output_head.RemoteHead(encrypted.products, heads, 512).rows == 512  # whole blocks of a ciphertext
    monkeypatch.setattr(encrypted._head, "rows", 5)
    loss, own = loss_and_gradients(encrypted)
    expected, reference = loss_and_gradients(plain)
    assert abs(loss - expected) < 1e-3 * expected
    for name, gradient in own.items():
        assert float(F.cosine_similarity(gradient.flatten(), reference[name].flatten(), dim=0)) >= 0.999, name


def test_a_remote_head_has_no_products_of_the_clients_own(
    models: tuple[EncryptedCausalLM, PlaintextPeftModel],
) -> None:
    with pytest.raises(InputError, match="the plan's head is remote: drop head_products"):
        EncryptedCausalLM(models[0].bundle, models[0].products, head_dtype=torch.bfloat16)


def test_the_next_token_has_the_logits_of_plaintext(models: tuple[EncryptedCausalLM, PlaintextPeftModel]) -> None:
    encrypted, plain = models
    prompt = batch()["input_ids"][0, :6]
    with torch.no_grad():
        logits = encrypted.next_logits(AttentionCache(), {0: prompt.tolist()})[0]
        expected = plain(input_ids=prompt[None], attention_mask=torch.ones(1, 6)).logits[0, -1]
    assert float((logits - expected).abs().max()) < 0.06 * float(expected.abs().max())
