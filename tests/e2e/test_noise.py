"""Measure the noise of the worker's products, decrypted, for every linear of the small Llama in both directions."""

from __future__ import annotations

import pytest
import torch

from hecompile.he.fused import decrypt_reals, encrypt_reals
from hecompile.he.hints import Hint, HintStore
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.scheme import decrypt, encrypt_tokens, setup
from hecompile.inspection.linear import circuits_without_gradient, predicted_traffic
from hecompile.runtime.worker.engines import create_engine
from tests.e2e.conftest import Build

TOKENS = 200


def test_noise_of_every_circuit_is_within_its_bound_and_as_wide_as_predicted(build: Build) -> None:
    client, engine = build.client, create_engine("onnxruntime", build.worker)
    public = PublicMatrix(client.ring, client.public_seed, max(p.in_features for p in client.circuits.values()))
    hints = HintStore(client.hints, client.ring, cache_bytes=0)
    generator = torch.Generator().manual_seed(3)
    assert len(client.circuits) == 4 * 4 * 2 - 1  # layers, linears, directions; nothing is before the first linear
    for name, parameters in client.circuits.items():
        shape = (TOKENS, parameters.in_features)
        bound = parameters.input_bound
        x = torch.randint(-bound, bound + 1, shape, generator=generator)
        x[0], x[1] = bound, -bound
        ciphertext, key = encrypt_tokens(public, x, parameters)
        reply = torch.from_numpy(engine.evaluate(name, ciphertext.planes.numpy()))
        stored = torch.from_numpy(build.worker.weight(name))  # int8 or int16 [in, out]
        weight = stored.long()
        hint = Hint.from_coefficients(client.ring, setup(stored.t(), public))
        decrypted = decrypt(key, hint, reply, parameters)  # [T, out]
        noise = (decrypted - x @ weight).double()
        assert float(noise.abs().max()) <= parameters.noise_bound, name
        predicted = torch.as_tensor(parameters.noise_std(weight.double().norm(dim=0)))  # [out]
        ratio = float((noise.square().mean(dim=0) / predicted.square()).mean().sqrt())
        assert 0.9 < ratio < 1.1, f"{name}: noise is {ratio:.3f} of the predicted"
        recorded = client.plan.circuits[name].noise_std
        reals = torch.randn(TOKENS, parameters.in_features, generator=generator)
        ciphertext, real_key = encrypt_reals(public, reals, parameters)
        reply = torch.from_numpy(engine.evaluate(name, ciphertext.planes.numpy()))
        kept = hints.hint(name, parameters.out_features, parameters.decryption_precision)
        result = decrypt_reals(real_key, kept, reply, parameters)
        scale = torch.from_numpy(real_key.scale)[:, None]
        integers = (reals.double() / scale).round()
        noise = result.double() / scale - integers @ weight.double()
        ratio = float((noise.square().mean(dim=0) / predicted.square()).mean().sqrt())
        assert 0.9 < ratio < 1.1, f"{name}: noise through the fused kernels is {ratio:.3f} of the predicted"
        assert recorded == pytest.approx(float(predicted.square().mean().sqrt()), rel=1e-6), name


def test_inspect_predicts_the_bytes_on_the_wire(build: Build, batch: dict[str, torch.Tensor]) -> None:
    model = build.encrypted()
    logits = model(batch["input_ids"], batch["attention_mask"]).logits
    assert logits is not None
    tokens = model.stats()["tokens"]
    forward = predicted_traffic({n: p for n, p in build.client.circuits.items() if n.endswith(".forward")})
    up, down = model.stats()["bytes_up"], model.stats()["bytes_down"]
    assert up == pytest.approx(tokens * forward.bytes_up, rel=0.01)
    assert down == pytest.approx(tokens * forward.bytes_down, rel=0.01)
    before = model.stats()
    loss = model(**batch).loss
    assert loss is not None
    loss.backward()
    training = predicted_traffic(build.client.circuits, circuits_without_gradient(build.client.graph()))
    up, down = (model.stats()[name] - before[name] for name in ("bytes_up", "bytes_down"))
    # An upper bound: what is masked in the last of the four layers is not sent, in either direction.
    assert 0.7 < up / (tokens * training.bytes_up) < 1.0
    assert 0.7 < down / (tokens * training.bytes_down) < 1.0
