"""Examine what a worker sees: its whole traffic, recorded, and its bundle."""

from __future__ import annotations

import io
import json
import logging

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hecompile.bundles.client import ClientBundle
from hecompile.graph.rotation import rotate
from hecompile.models import TINY_LLAMA
from hecompile.passes.offload.rotate import _scales
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import EncryptedProducts
from hecompile.runtime.transports import SocketTransport
from hecompile.runtime.wire import framing
from hecompile.runtime.wire.protocol import EvaluateRequest, decode_request
from hecompile.runtime.worker.servers.sockets import WorkerServer
from hecompile.runtime.worker.worker import Worker
from tests.e2e.conftest import Build

_KNOWN_ANSWER_REQUESTS = 2


class Wiretap:
    """Record everything that a client sent, decoded as the worker decodes it, with the plaintext that it was made from."""

    def __init__(self, bundle: ClientBundle, address: str) -> None:
        self.frames: list[bytes] = []
        self.plaintexts: list[tuple[str, Tensor]] = []
        transport = SocketTransport(address, recorder=self._record)
        self.products = EncryptedProducts(bundle, transport)
        original = self.products.product

        def noting(
            circuit: str, x: Tensor, column_scale: Tensor | None = None, row_scale: Tensor | None = None
        ) -> Tensor:
            scaled = x.detach() if column_scale is None else x.detach() * column_scale
            self.plaintexts.append((circuit, scaled.clone()))
            return original(circuit, x, column_scale, row_scale)

        self.products.product = noting  # type: ignore[method-assign]

    def _record(self, direction: str, frame: bytes) -> None:
        if direction == "sent":
            self.frames.append(bytes(frame))

    def ciphertexts(self) -> list[tuple[str, np.ndarray]]:
        """(circuit, uint8 [limbs, T, in]) per request, hello and known answers left out."""
        planes = []
        for raw in self.frames:
            header, payload = _split_frame(raw)
            if header["kind"] == "evaluate" and header["circuit"] != "known_answer":
                _, request = decode_request(framing.Frame(json.dumps(header).encode(), payload))
                assert isinstance(request, EvaluateRequest)
                planes.append((request.circuit, request.planes))
        return planes


def _split_frame(raw: bytes) -> tuple[dict[str, object], bytes]:
    _, header_bytes, payload_bytes = framing.PREFIX.unpack_from(raw)
    start = framing.PREFIX.size
    header = json.loads(raw[start : start + header_bytes])
    payload = raw[start + header_bytes :]
    assert len(payload) == payload_bytes
    return header, payload


@pytest.fixture
def wiretap(build: Build) -> Wiretap:
    with WorkerServer(Worker(build.worker), "tcp://127.0.0.1:0") as server:
        tap = Wiretap(build.client, server.address)
        yield tap  # type: ignore[misc]
        tap.products.close()


def _step(build: Build, tap: Wiretap, batch: dict[str, Tensor], adapter: dict[str, Tensor]) -> None:
    model = EncryptedCausalLM(build.client, tap.products)
    model.load_adapter_state(adapter)
    loss = model(**batch).loss
    assert loss is not None
    loss.backward()


def test_equal_plaintexts_give_unrelated_ciphertexts(
    build: Build, wiretap: Wiretap, batch: dict[str, Tensor], adapter: dict[str, Tensor]
) -> None:
    for _ in range(2):
        _step(build, wiretap, batch, adapter)
    sent, plain = wiretap.ciphertexts(), wiretap.plaintexts
    half = len(sent) // 2
    # The first remote product of a step sees the same activations to the last bit: they come from the client alone.
    assert torch.equal(plain[0][1], plain[half][1]) and sent[0][0] == sent[half][0]
    for (circuit, first), (_, second) in zip(sent[:half], sent[half:], strict=True):
        assert first.shape == second.shape, circuit
        # Independent uniform bytes agree in 1 of 256 places; the lowest plane has some bits of each byte alone.
        for one, other, bits in zip(first, second, plane_bits(build, circuit), strict=True):
            agreement, expected = float((one == other).mean()), 2.0**-bits
            deviation = 5 * np.sqrt(expected / one.size)
            assert abs(agreement - expected) < deviation + 1e-4, f"{circuit}: {agreement:.5f} of the bytes repeat"


def plane_bits(build: Build, circuit: str) -> list[int]:
    """Return how many bits of every byte are used, plane by plane, lowest first."""
    linear = build.client.circuits[circuit]
    return [linear.upload_bits - 8 * (linear.upload_limbs - 1), *[8] * (linear.upload_limbs - 1)]


def test_no_tensor_on_the_wire_correlates_with_what_it_encrypts(
    build: Build, wiretap: Wiretap, batch: dict[str, Tensor], adapter: dict[str, Tensor]
) -> None:
    _step(build, wiretap, batch, adapter)
    sent = wiretap.ciphertexts()
    assert len(sent) == len(wiretap.plaintexts) == 4 * 4 * 2 - 1
    for (circuit, planes), (expected, x) in zip(sent, wiretap.plaintexts, strict=True):
        assert circuit == expected and planes.shape[1:] == tuple(x.shape)
        words = sum(plane.astype(np.float64) * 256.0**limb for limb, plane in enumerate(planes))
        limit = 6 / np.sqrt(x.numel())  # six standard deviations of the correlation of independent samples
        values = x.numpy().astype(np.float64)
        for view in (words, *planes.astype(np.float64)):
            for probe in (values, np.abs(values)):
                assert abs(np.corrcoef(view.ravel(), probe.ravel())[0, 1]) < limit, circuit
        for plane, bits in zip(planes, plane_bits(build, circuit), strict=True):
            assert not (plane & ((1 << (8 - bits)) - 1)).any()  # what is not used is not sent
            counts = np.bincount(plane.ravel() >> (8 - bits), minlength=1 << bits)
            mean, freedom = plane.size / len(counts), len(counts) - 1
            statistic = float(((counts - mean) ** 2 / mean).sum())  # every byte is uniform: chi-square
            assert abs(statistic - freedom) < 7 * np.sqrt(2 * freedom), f"{circuit}: {statistic:.0f}"


def test_the_same_check_catches_plaintext(build: Build, batch: dict[str, Tensor]) -> None:
    """The probe of the test above would see unencrypted words: the test can fail."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    words = (x * 1000).to(torch.int32).numpy().astype(np.int64) % 2**32
    assert abs(np.corrcoef((words >> 24).ravel(), x.numpy().ravel())[0, 1]) > 6 / np.sqrt(x.numel())


def test_requests_carry_nothing_but_circuit_shape_and_ciphertext(
    build: Build, wiretap: Wiretap, batch: dict[str, Tensor], adapter: dict[str, Tensor]
) -> None:
    _step(build, wiretap, batch, adapter)
    kinds = [_split_frame(raw)[0] for raw in wiretap.frames]
    assert [header["kind"] for header in kinds[: 1 + _KNOWN_ANSWER_REQUESTS]] == ["hello", "evaluate", "evaluate"]
    for header in kinds:
        allowed = {"hello": {"kind", "id", "protocol", "plan_id"}, "evaluate": {"kind", "id", "circuit", "shape"}}
        assert set(header) == allowed[str(header["kind"])]


def test_requests_have_the_same_shapes_whatever_the_values(
    build: Build, wiretap: Wiretap, batch: dict[str, Tensor], adapter: dict[str, Tensor]
) -> None:
    """An adapter that saturates attention makes gradients of whole tokens vanish, which must not show."""
    shapes, zeros = [], []
    for factor in (0.0, 1.0, 20.0):
        wiretap.frames.clear()
        wiretap.plaintexts.clear()
        scores = {name: factor * value if "q_proj" in name or "k_proj" in name else value for name, value in adapter.items()}
        _step(build, wiretap, batch, scores)
        shapes.append([(circuit, planes.shape) for circuit, planes in wiretap.ciphertexts()])
        zeros.append(sum(int((~x.ne(0).any(dim=1)).sum()) for _, x in wiretap.plaintexts))
    assert zeros[:2] == [0, 0] and zeros[2] > 0  # the case is there
    assert shapes[0] == shapes[1] == shapes[2]


def test_the_worker_bundle_is_public_weights_and_nothing_else(build: Build) -> None:
    base = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    frozen = dict(base.named_parameters())
    directory = build.worker.directory
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    expected = {"manifest.json"}
    for name in build.worker.circuits:
        expected |= {f"circuits/{name}/{path}" for path in ("config.pbtxt", "1/model.onnx", "1/weight.bin")}
    assert files <= expected
    manifest = (build.worker.directory / "manifest.json").read_text()
    assert build.client.public_seed.hex() not in manifest, "the worker does not need the seed"
    for name in build.client.circuits:
        linear, _, direction = name.rpartition(".")
        model = ir.load(build.worker.circuit_path(name))
        large = [v for v in model.graph.initializers.values() if v.const_value is not None and v.const_value.size > 64]
        assert len(large) == 2, name  # two bytes of a 10-bit weight
        weight = build.worker.weight(name)  # [features_in, features_out]
        rows = weight if direction == "backward" else weight.T  # [out, in]
        prefix, _, parts = linear.rpartition(".")
        stacked = torch.cat([frozen[f"{prefix}.{part}.weight"] for part in parts.split("-")]).detach()
        balance = _scales(torch.linalg.vector_norm(stacked, dim=0))
        public = rotate(stacked / balance)  # as passes/offload/rotate.py makes it of the weights alone
        steps = public / (public.abs().amax(dim=1, keepdim=True) / 511)
        rounding = torch.from_numpy(rows.astype(np.float32)) - steps
        assert rounding.square().mean().sqrt() < 0.7 and rounding.abs().max() < 6, name  # nearest: 0.29 and 0.5


def test_no_log_or_error_shows_text_tokens_or_values(
    build: Build, batch: dict[str, Tensor], adapter: dict[str, Tensor]
) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with WorkerServer(Worker(build.worker), "tcp://127.0.0.1:0") as server:
            tap = Wiretap(build.client, server.address)
            _step(build, tap, batch, adapter)
            with pytest.raises(Exception, match="infinite or NaN") as caught:
                tap.products.product(next(iter(build.client.circuits)), torch.full((1, 256), float("nan")))
            tap.products.close()
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    text = stream.getvalue() + str(caught.value)
    assert "evaluated model.layers.0" in text, "the log was not captured: nothing was tested"
    values = [f"{float(v):.4f}" for _, x in wiretap_values(tap) for v in x.flatten()[:50] if abs(float(v)) > 1]
    assert not any(value in text for value in values)


def wiretap_values(tap: Wiretap) -> list[tuple[str, Tensor]]:
    assert tap.plaintexts
    return tap.plaintexts
