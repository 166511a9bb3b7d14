"""The same vectors through every engine and every transport give the same bytes: those of exact integer arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.worker import KNOWN_ANSWER, WorkerBundle, known_answer_vector
from hecompile.compiler.worker_bundle_writer import WorkerBundleWriter
from hecompile.errors import InputError, WorkerError
from hecompile.integers import MAX_INT16_WEIGHT
from hecompile.passes.offload.lower_worker import LowerWorker
from hecompile.plan.encrypted_linear import encrypted_linear_model
from hecompile.runtime.transports import InProcessTransport, Transport, TransportPool, connect, open_connection
from hecompile.runtime.worker.engines import ENGINES, Engine, create_engine, vnni_kernel
from hecompile.runtime.worker.engines.cuda_engine import CudaEngine
from hecompile.runtime.worker.engines.torch_engine import TorchEngine
from hecompile.runtime.worker.servers.open_server import open_server
from hecompile.runtime.worker.worker import Worker
from hecompile.word_sizes import bytes_of, unused_bits, wire_bytes
from tests.support.bundles import PLAN_ID, development_credentials, extreme_planes, extreme_weight, write_bundle

IN, OUT = 67, 29  # odd, so that vector kernels meet their remainders
TINY_IN, TINY_OUT = 4, 3
WHOLE_BYTES = [(8 * limbs, 8 * reply) for limbs in range(1, 5) for reply in range(1, limbs + 1)]
BITS = [*WHOLE_BYTES, (9, 8), (13, 11), (22, 12), (22, 22), (31, 19)]
CONCRETE_BITS = [(8, 8), (24, 24), (32, 16), (22, 12)]
WEIGHT = extreme_weight(IN, OUT)
TINY_WEIGHT = extreme_weight(TINY_IN, TINY_OUT)
WIDE_WEIGHT = np.random.default_rng(3).integers(-32768, MAX_INT16_WEIGHT, (IN, OUT), dtype=np.int16)
WIDE_WEIGHT[:, :3] = MAX_INT16_WEIGHT, -32768, 128  # 128 is 256 - 128 in balanced bytes


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> WorkerBundle:
    linears = {f"linear_{upload}_{reply}": (WEIGHT, upload, reply) for upload, reply in BITS}
    linears |= {f"wide_{upload}_{reply}": (WIDE_WEIGHT, upload, reply) for upload, reply in BITS}
    linears |= {f"tiny_{upload}_{reply}": (TINY_WEIGHT, upload, reply) for upload, reply in CONCRETE_BITS}
    return write_bundle(tmp_path_factory.mktemp("conformance") / "worker", linears)


@pytest.fixture(scope="module", params=["onnxruntime", "torch", "vnni", "torch-cuda-on-cpu"])
def engine(request: pytest.FixtureRequest, bundle: WorkerBundle) -> Engine:
    """`torch-cuda-on-cpu` is the CUDA engine with its padding, layouts and chunks, on the CPU."""
    if request.param == "vnni" and not vnni_kernel.supported():
        pytest.skip("this CPU has no AVX512-VNNI")
    if request.param == "torch-cuda-on-cpu":
        return CudaEngine(bundle, device="cpu", chunk_tokens=20)
    return create_engine(request.param, bundle)


@pytest.fixture(scope="module")
def concrete(bundle: WorkerBundle) -> Engine:
    return create_engine("concrete", bundle)


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize(("upload_bits", "reply_bits"), BITS)
@pytest.mark.parametrize(("name", "forward"), [("linear", WEIGHT), ("wide", WIDE_WEIGHT)])
def test_engine_is_exact(
    engine: Engine, name: str, forward: np.ndarray, upload_bits: int, reply_bits: int, tokens: int
) -> None:
    for direction, weight in (("forward", forward), ("backward", forward.T)):
        planes = extreme_planes(bytes_of(upload_bits), tokens, weight.shape[0], seed=tokens)
        planes[0] &= 255 << unused_bits(upload_bits) & 255
        reply = engine.evaluate(f"{name}_{upload_bits}_{reply_bits}.{direction}", planes)
        assert reply.dtype == np.uint8 and reply.shape == (bytes_of(reply_bits), tokens, weight.shape[1])
        assert not (reply[0] & (1 << unused_bits(reply_bits)) - 1).any()
        np.testing.assert_array_equal(reply, encrypted_linear_reference(planes, weight, reply_bits))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("upload_bits", "reply_bits"), CONCRETE_BITS)
def test_tfhe_gives_the_same_bytes(
    engine: Engine, concrete: Engine, upload_bits: int, reply_bits: int, direction: str
) -> None:
    circuit = f"tiny_{upload_bits}_{reply_bits}.{direction}"
    planes = extreme_planes(bytes_of(upload_bits), 2, TINY_IN if direction == "forward" else TINY_OUT)
    planes[0, 1] = np.arange(planes.shape[2])
    np.testing.assert_array_equal(concrete.evaluate(circuit, planes), engine.evaluate(circuit, planes))


def test_tfhe_passes_the_known_answer(concrete: Engine) -> None:
    planes, expected = known_answer_vector(PLAN_ID)
    np.testing.assert_array_equal(concrete.evaluate(KNOWN_ANSWER, planes[:, :1]), expected[:, :1])


def test_tfhe_takes_a_weight_of_zeros(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "worker", {"zero": (np.zeros((2, 1), dtype=np.int8), 8, 8)})
    reply = create_engine("concrete", bundle).evaluate("zero.forward", np.full((1, 1, 2), 255, dtype=np.uint8))
    np.testing.assert_array_equal(reply, np.zeros((1, 1, 1), dtype=np.uint8))


def test_tfhe_refuses_a_large_linear(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "worker", {"wide": (extreme_weight(300, 300), 8, 8)})
    with pytest.raises(WorkerError, match=r"wide\.forward: 300 × 300 = 90000 weights; .* at most 65536"):
        create_engine("concrete", bundle).evaluate("wide.forward", np.zeros((1, 1, 300), dtype=np.uint8))


@pytest.mark.parametrize(
    ("circuit", "planes", "message"),
    [
        ("absent.forward", np.zeros((1, 1, IN), np.uint8), "no circuit 'absent.forward'"),
        ("linear_24_16.forward", np.zeros((3, 1, IN), np.int8), "planes are int8; needs uint8"),
        ("linear_24_16.forward", np.zeros((2, 1, IN), np.uint8), r"shape \[2, 1, 67\]; needs \[3, T, 67\]"),
        ("linear_24_16.forward", np.zeros((3, 1, IN + 1), np.uint8), r"shape \[3, 1, 68\]; needs \[3, T, 67\]"),
        ("linear_24_16.forward", np.zeros((3, 0, IN), np.uint8), "T at least 1"),
        ("linear_24_16.forward", np.zeros((3, IN), np.uint8), r"shape \[3, 67\]"),
    ],
)
@pytest.mark.parametrize("name", ["auto", "onnxruntime", "torch", "concrete"])
def test_engine_refuses(bundle: WorkerBundle, name: str, circuit: str, planes: np.ndarray, message: str) -> None:
    with pytest.raises(WorkerError, match=message):
        create_engine(name, bundle).evaluate(circuit, planes)


def test_engine_accepts_planes_that_are_read_only_and_strided(engine: Engine) -> None:
    planes = extreme_planes(3, 8, IN)[:, ::2]
    planes.flags.writeable = False
    reply = engine.evaluate("linear_24_16.forward", planes)
    np.testing.assert_array_equal(reply, encrypted_linear_reference(planes, WEIGHT, 16))


@pytest.mark.parametrize("make", [TorchEngine, partial(CudaEngine, device="cpu"), partial(create_engine, "auto")])
def test_a_backward_that_is_not_the_transpose_is_not_shared(
    make: Callable[[WorkerBundle], Engine], tmp_path: Path
) -> None:
    matrices = {"pair.forward": extreme_weight(8, 6, seed=1), "pair.backward": extreme_weight(6, 8, seed=2)}
    with WorkerBundleWriter(tmp_path / "worker", PLAN_ID) as writer:
        for name, matrix in matrices.items():
            writer.add(LowerWorker()(encrypted_linear_model(matrix, 16, 16, name)).model)
        engine = make(writer.commit())
    for name, matrix in matrices.items():
        planes = extreme_planes(2, 3, matrix.shape[0])
        np.testing.assert_array_equal(engine.evaluate(name, planes), encrypted_linear_reference(planes, matrix, 16))


def test_unknown_engine_is_named_with_the_choices(bundle: WorkerBundle) -> None:
    with pytest.raises(InputError, match="unknown engine 'abacus'; choose one of auto, vnni, onnxruntime, torch"):
        create_engine("abacus", bundle)
    assert "concrete" in ENGINES


LISTEN = {
    "tcp": "tcp://127.0.0.1:0",
    "pool": "tcp://127.0.0.1:0",
    "unix": "unix://{directory}/socket",
    "flight": "flight://127.0.0.1:0",
    "flight-pool": "flight://127.0.0.1:0",
    "flight-tls": "flights://127.0.0.1:0",
    "grpc": "grpc://127.0.0.1:0",
    "grpcs": "grpcs://127.0.0.1:0",
}


@contextmanager
def open_transport(kind: str, worker: Worker, directory: Path) -> Iterator[Transport]:
    with ExitStack() as stack:
        if kind == "inprocess":
            transport: Transport = InProcessTransport(worker.exchange)
        else:
            listen = LISTEN[kind].format(directory=directory)
            own, other = None, None
            if listen.startswith("flight"):
                pytest.importorskip("grpc")
            if listen.startswith(("flights:", "grpcs:")):
                own, other = development_credentials(directory)
            address = stack.enter_context(open_server(worker, listen, credentials=own)).address
            pool = kind in ("pool", "flight-pool")
            transport = TransportPool(lambda: connect(address), 3) if pool else connect(address, credentials=other)
        stack.callback(transport.close)
        yield transport


@pytest.mark.parametrize("kind", ["inprocess", *LISTEN])
def test_every_transport_gives_the_same_bytes(
    kind: str, bundle: WorkerBundle, engine: Engine, tmp_path: Path
) -> None:
    """Words of 22 bits travel as such, but over the Open Inference Protocol, whose servers know bytes."""
    with open_transport(kind, Worker(bundle, engine), tmp_path) as transport:
        info = open_connection(transport, PLAN_ID)
        assert info.engine == (f"hecompile_{engine.name}" if kind in ("grpc", "grpcs") else engine.name)
        assert info.circuits.keys() == bundle.circuits.keys()
        for upload_bits, reply_bits in ((32, 24), (22, 12)):
            planes = extreme_planes(bytes_of(upload_bits), 33, IN)
            planes[0] &= 255 << unused_bits(upload_bits) & 255
            answer = transport.evaluate(f"linear_{upload_bits}_{reply_bits}.forward", planes)
            np.testing.assert_array_equal(answer.planes, encrypted_linear_reference(planes, WEIGHT, reply_bits))
            bits = (8 * len(planes), 8 * len(answer.planes)) if kind in ("grpc", "grpcs") else (upload_bits, reply_bits)
            # Messages are counted whole: names and shapes beside the planes, and 16 bytes before a frame.
            assert 16 < answer.bytes_sent - wire_bytes(bits[0], 33 * IN) < 200
            assert 16 < answer.bytes_received - wire_bytes(bits[1], 33 * OUT) < 200
            assert answer.worker_seconds > 0


@pytest.mark.parametrize("kind", ["inprocess", "pool", "flight", "flight-pool", "flight-tls", "grpc", "grpcs"])
def test_requests_of_several_threads_are_not_mixed_up(
    kind: str, bundle: WorkerBundle, engine: Engine, tmp_path: Path
) -> None:
    """More threads than connections, each with ciphertexts of its own in both directions."""
    requests = [(i, direction) for i in range(6) for direction in ("forward", "backward")]

    def ask(index: int, direction: str) -> tuple[np.ndarray, np.ndarray]:
        weight = WEIGHT if direction == "forward" else WEIGHT.T
        planes = extreme_planes(4, 5 + index, weight.shape[0], seed=index)
        reply = transport.evaluate(f"linear_32_24.{direction}", planes).planes
        return reply, encrypted_linear_reference(planes, weight, 24)

    with open_transport(kind, Worker(bundle, engine), tmp_path) as transport, ThreadPoolExecutor(5) as threads:
        open_connection(transport, PLAN_ID)
        assert transport.concurrent
        for reply, expected in threads.map(lambda request: ask(*request), requests):
            np.testing.assert_array_equal(reply, expected)
