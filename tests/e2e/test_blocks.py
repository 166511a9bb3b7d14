"""Send any number of tokens through the whole client path: below, at and above the ring dimension, and several blocks."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import CleartextProducts, EncryptedProducts
from hecompile.runtime.transports import InProcessTransport
from hecompile.runtime.wire import protocol
from hecompile.runtime.wire.framing import Frame
from hecompile.runtime.worker.worker import Worker
from hecompile.word_sizes import wire_bytes
from tests.e2e.conftest import SEQUENCE_BUCKETS, Build

OVERHEAD = 250
"""More bytes than a request has beside its ciphertext."""


def ragged(tokens: int) -> dict[str, Tensor]:
    """Make a batch with `tokens` tokens to predict from, most sequences as long as a bucket allows, one short."""
    longest = SEQUENCE_BUCKETS[-1] - 1
    lengths = [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
    generator = torch.Generator().manual_seed(tokens)
    input_ids = torch.randint(3, 1000, (len(lengths), longest + 1), generator=generator)
    real = torch.arange(longest + 1)[None] <= torch.tensor(lengths)[:, None]  # one more: the last is only a label
    return {
        "input_ids": torch.where(real, input_ids, 0),
        "attention_mask": real.long(),
        "labels": torch.where(real, input_ids, -100),
    }


def gradients(model: EncryptedCausalLM, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    loss = model(**batch).loss
    assert loss is not None
    state = model.adapter_state()
    return loss.item(), dict(zip(state, torch.autograd.grad(loss, list(state.values())), strict=True))


@pytest.mark.parametrize("case", ["one", "one below", "ring_dim", "one above", "three blocks"])
def test_any_number_of_tokens(build: Build, adapter: dict[str, Tensor], case: str) -> None:
    ring_dim = build.client.ring.ring_dim
    sizes = {"one": 1, "one below": ring_dim - 1, "ring_dim": ring_dim, "one above": ring_dim + 1}
    tokens = sizes.get(case, 2 * ring_dim + 7)
    bundle = replace(build.client, plan=build.client.plan.model_copy(update={"batch_size": 64}))
    requests: list[tuple[str, tuple[int, ...], int]] = []

    class Listening(Worker):
        def exchange(self, frame: Frame) -> Frame:
            _, request = protocol.decode_request(frame)
            if isinstance(request, protocol.EvaluateRequest) and request.circuit in bundle.circuits:
                requests.append((request.circuit, request.planes.shape, frame.size))
            return super().exchange(frame)

    encrypted = EncryptedCausalLM(bundle, EncryptedProducts(bundle, InProcessTransport(Listening(build.worker).exchange)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clear = EncryptedCausalLM(bundle, CleartextProducts(bundle, build.worker))
    for model in (encrypted, clear):
        model.load_adapter_state(adapter)
    batch = ragged(tokens)
    loss, own = gradients(encrypted, batch)
    expected_loss, expected = gradients(clear, batch)
    assert loss == pytest.approx(expected_loss, rel=0.02)
    for name, gradient in own.items():
        if tokens == 1 and ("q_proj" in name or "k_proj" in name):
            # One token attends to itself alone, whatever q and k are.
            assert gradient.norm() < 1e-4 * own[name.replace("q_proj", "v_proj").replace("k_proj", "v_proj")].norm()
            continue
        assert float(F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)) > 0.99, name
    assert encrypted.stats()["tokens"] == tokens
    assert {circuit for circuit, _, _ in requests} >= {name for name in bundle.circuits if name.endswith(".forward")}
    for circuit, shape, size in requests:
        # A row per token and circuit and nothing for padding, whatever the block size.
        parameters = bundle.circuits[circuit]
        assert shape == (parameters.upload_limbs, tokens, parameters.in_features), circuit
        assert size < wire_bytes(parameters.upload_bits, tokens * parameters.in_features) + OVERHEAD


@pytest.mark.parametrize("zeros", ["none", "some", "all"])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_products_across_the_ring_dimension_and_rows_of_zeros(build: Build, extra: int, zeros: str) -> None:
    """Within the noise bound of the exact product; rows of zeros travel like any others and come back as exact zeros."""
    circuit = "model.layers.1.mlp.down_proj.backward"
    parameters = build.client.circuits[circuit]
    products = EncryptedProducts(build.client, InProcessTransport(Worker(build.worker).exchange))
    tokens = build.client.ring.ring_dim + extra
    x = torch.randn(tokens, parameters.in_features, generator=torch.Generator().manual_seed(tokens))
    x[{"none": slice(0), "some": slice(0, None, 3), "all": slice(None)}[zeros]] = 0.0
    live = x.ne(0).any(dim=1)
    sent = products.costs.bytes_up
    result = products.product(circuit, x)
    expected = x.double() @ torch.from_numpy(build.worker.weight(circuit).astype("float64"))
    assert result.shape == (tokens, parameters.out_features)
    assert bool(result[~live].eq(0).all())
    # Encoded in steps of max|x| / input_bound at the coarsest; noise and rounding of the encoding add up.
    step = x.abs().amax(dim=1, keepdim=True).double() / parameters.input_bound
    bound = step * (parameters.noise_bound + 0.5 * parameters.max_l1 + 1)
    assert bool(((result - expected).abs() <= bound + 1e-4 * expected.abs()).all())
    payload = wire_bytes(parameters.upload_bits, tokens * parameters.in_features)
    assert payload <= products.costs.bytes_up - sent < payload + OVERHEAD
