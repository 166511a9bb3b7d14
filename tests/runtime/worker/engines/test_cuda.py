"""The CUDA engine: its fused kernels under Triton's interpreter, and what of it runs without a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.worker import KNOWN_ANSWER, WorkerBundle, known_answer_vector
from hecompile.errors import WorkerError
from hecompile.runtime.worker.engines import create_engine, torch_engine
from hecompile.runtime.worker.engines.cuda_engine import CudaEngine
from hecompile.word_sizes import bytes_of
from tests.support.bundles import PLAN_ID, extreme_planes, extreme_weight, write_bundle

WHOLE_BYTES = [(8 * limbs, 8 * reply) for limbs in range(1, 5) for reply in range(1, limbs + 1)]
BITS = [*WHOLE_BYTES, (9, 8), (22, 12), (22, 22), (31, 19)]
KERNELS = Path(torch_engine.__file__).with_name("triton_kernels.py")
SPLIT = {"planes": "*u8", "digits": "*i8", "used": "i32", "rows": "i32", "features": "i32"}
RECOMBINE = {"low": "*i32", "high": "*i32", "reply": "*u8", "columns": "i32", "stride": "i32"}
WORD = {"LIMBS": 3, "DIGITS": 2, "REPLY_BYTES": 2, "DROPPED": 11, "BLOCK": 1024}
COMPILED = [
    ("_split", SPLIT | {"tokens": "i32"}, {"LIMBS": 3, "BLOCK": 1024}),
    ("_split", SPLIT, {"LIMBS": 3, "BLOCK": 1024, "tokens": 1}),  # Triton makes a constant of an argument that is 1
    ("_recombine", RECOMBINE | {"tokens": "i32"}, WORD),
    ("_recombine", RECOMBINE, WORD | {"tokens": 1, "DIGITS": 1}),
]
WIDE = np.random.default_rng(0).integers(-32768, 32640, (37, 21), dtype=np.int16)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> WorkerBundle:
    linears = {f"byte_{upload}_{reply}": (extreme_weight(37, 21), upload, reply) for upload, reply in BITS}
    linears |= {f"wide_{upload}_{reply}": (WIDE, upload, reply) for upload, reply in BITS}
    return write_bundle(tmp_path_factory.mktemp("cuda") / "worker", linears)


def load_kernels(name: str) -> ModuleType:
    """A copy of the module of its own: Triton decides when a kernel is defined whether it is compiled or interpreted."""
    spec = importlib.util.spec_from_file_location(name, KERNELS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def triton_kernels() -> Iterator[ModuleType]:
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield load_kernels("interpreted_kernels")


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("name", "dynamic", "fixed"), COMPILED)
def test_kernels_compile_without_a_gpu(
    name: str, dynamic: dict[str, str], fixed: dict[str, int], architecture: int
) -> None:
    triton = pytest.importorskip("triton")
    compiler, target = pytest.importorskip("triton.compiler"), pytest.importorskip("triton.backends.compiler")
    kernel = getattr(load_kernels("compiled_kernels"), name)
    types = dynamic | dict.fromkeys(fixed, "constexpr")
    source = compiler.ASTSource(kernel, {argument: types[argument] for argument in kernel.arg_names}, fixed)
    compiled = triton.compile(source, target=target.GPUTarget("cuda", architecture, 32))
    assert f".target sm_{architecture}" in compiled.asm["ptx"] and compiled.asm["cubin"]


@pytest.mark.parametrize(("tokens", "used", "rows", "features"), [(1, 5, 32, 16), (33, 48, 160, 48), (9, 700, 64, 704)])
@pytest.mark.parametrize("limbs", [1, 2, 3, 4])
def test_split_digits_is_the_reference(
    triton_kernels: ModuleType, limbs: int, tokens: int, used: int, rows: int, features: int
) -> None:
    planes = torch.from_numpy(extreme_planes(limbs, tokens, used))
    expected = torch_engine.split_digits(planes, rows, features)
    assert torch.equal(triton_kernels.split_digits(planes, rows, features), expected)


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize(("upload_bits", "reply_bits"), BITS)
def test_recombine_is_the_reference(
    triton_kernels: ModuleType, upload_bits: int, reply_bits: int, digits: int
) -> None:
    limbs = bytes_of(upload_bits)
    tokens, columns, stride = 11, 130, 144
    shape = (limbs * tokens + 3, stride)
    generator = torch.Generator().manual_seed(limbs)
    products = [torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32) for _ in range(digits)]
    products[0][:tokens] = -(2**31)
    products[0][0] = 2**31 - 1
    if limbs == 1:
        products = products[:1]  # the second digit of a weight is 0 mod 2^8
    expected = torch_engine.recombine(products, limbs, tokens, columns, reply_bits)
    assert torch.equal(triton_kernels.recombine(products, limbs, tokens, columns, reply_bits), expected)


@pytest.mark.parametrize("linear", ["byte", "wide"])
@pytest.mark.parametrize(("upload_bits", "reply_bits"), [(8, 8), (24, 16), (32, 24), (22, 12)])
def test_engine_with_triton_kernels_is_exact(
    bundle: WorkerBundle, triton_kernels: ModuleType, linear: str, upload_bits: int, reply_bits: int
) -> None:
    engine = CudaEngine(bundle, device="cpu", kernels=triton_kernels, chunk_tokens=16)
    forward = WIDE if linear == "wide" else extreme_weight(37, 21)
    for direction, weight in (("backward", forward.T), ("forward", forward)):
        planes = extreme_planes(bytes_of(upload_bits), 35, weight.shape[0])
        reply = engine.evaluate(f"{linear}_{upload_bits}_{reply_bits}.{direction}", planes)
        np.testing.assert_array_equal(reply, encrypted_linear_reference(planes, weight, reply_bits))


def test_engine_with_triton_kernels_passes_the_known_answer(bundle: WorkerBundle, triton_kernels: ModuleType) -> None:
    planes, expected = known_answer_vector(PLAN_ID)
    reply = CudaEngine(bundle, device="cpu", kernels=triton_kernels).evaluate(KNOWN_ANSWER, planes)
    np.testing.assert_array_equal(reply, expected)


def test_one_padded_copy_serves_both_directions(bundle: WorkerBundle) -> None:
    engine = CudaEngine(bundle, device="cpu", kernels=torch_engine)
    for direction, features in (("backward", 21), ("forward", 37)):
        engine.evaluate(f"byte_24_16.{direction}", extreme_planes(3, 4, features))
    assert list(engine._resident) == ["byte_24_16.backward"]
    assert [tuple(digit.shape) for digit in engine._resident["byte_24_16.backward"]] == [(48, 32)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_engine_says_so(bundle: WorkerBundle) -> None:
    with pytest.raises(WorkerError, match="finds no CUDA device; use the engine auto, torch or onnxruntime"):
        create_engine("torch-cuda", bundle)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("upload_bits", "reply_bits"), BITS)
def test_on_a_gpu_the_engine_is_exact(bundle: WorkerBundle, upload_bits: int, reply_bits: int) -> None:
    engine = CudaEngine(bundle, chunk_tokens=16)
    for direction, weight in (("forward", WIDE), ("backward", WIDE.T)):
        planes = extreme_planes(bytes_of(upload_bits), 35, weight.shape[0])
        reply = engine.evaluate(f"wide_{upload_bits}_{reply_bits}.{direction}", planes)
        np.testing.assert_array_equal(reply, encrypted_linear_reference(planes, weight, reply_bits))
    planes, expected = known_answer_vector(PLAN_ID)
    np.testing.assert_array_equal(engine.evaluate(KNOWN_ANSWER, planes), expected)


def test_a_long_request_in_chunks_is_the_short_ones_together(bundle: WorkerBundle) -> None:
    planes = extreme_planes(3, 50, 37)
    whole = CudaEngine(bundle, device="cpu", kernels=torch_engine).evaluate("byte_24_16.forward", planes)
    chunked = CudaEngine(bundle, device="cpu", kernels=torch_engine, chunk_tokens=7)
    np.testing.assert_array_equal(chunked.evaluate("byte_24_16.forward", planes), whole)
