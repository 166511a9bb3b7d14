"""The fused kernel at its seams: panels, quads, tiles, pieces of work, and several callers at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.worker import WorkerBundle
from hecompile.errors import WorkerError
from hecompile.runtime.worker import engines
from hecompile.runtime.worker.engines import create_engine, vnni_engine, vnni_kernel, vnni_tile
from hecompile.runtime.worker.engines.vnni_engine import (
    SMALLEST_BLOCK,
    VnniEngine,
    aligned,
    block_tokens,
    threads_worth,
)
from tests.support.bundles import extreme_planes, extreme_weight, write_bundle

needs_vnni = pytest.mark.skipif(not vnni_kernel.supported(), reason="this CPU has no AVX512-VNNI")
SHAPES = {"one_panel": (64, 64), "two_panels": (66, 128), "part_of_a_panel": (129, 193), "narrow": (3, 130)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> WorkerBundle:
    linears = {name: (extreme_weight(*shape), 24, 16) for name, shape in SHAPES.items()}
    return write_bundle(tmp_path_factory.mktemp("vnni") / "worker", linears)


@pytest.fixture
def _every_thread_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vnni_engine, "WORK_PER_THREAD", 1)


@needs_vnni
@pytest.mark.usefixtures("_every_thread_takes_part")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 2 * SMALLEST_BLOCK + 1])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_whole_and_partial_panels(bundle: WorkerBundle, name: str, tokens: int, threads: int) -> None:
    engine = VnniEngine(bundle, threads)
    forward = extreme_weight(*SHAPES[name])
    for direction, weight in (("forward", forward), ("backward", forward.T)):
        planes = extreme_planes(3, tokens, weight.shape[0], seed=tokens)
        reply = engine.evaluate(f"{name}.{direction}", planes)
        np.testing.assert_array_equal(reply, encrypted_linear_reference(planes, weight, 16))


@needs_vnni
def test_sums_beyond_32_bits_wrap_as_the_scheme_wants(tmp_path: Path) -> None:
    """255 · 32639 · 600 features passes 2^32 in the shifted sum, and the two digits' sums add up in one accumulator."""
    weight = np.full((600, 65), 32639, dtype=np.int16)
    weight[:, 1] = -32768
    bundle = write_bundle(tmp_path / "worker", {"wide": (weight, 32, 32)})
    planes = np.full((4, 3, 600), 255, dtype=np.uint8)
    reply = VnniEngine(bundle).evaluate("wide.forward", planes)
    np.testing.assert_array_equal(reply, encrypted_linear_reference(planes, weight, 32))


@needs_vnni
@pytest.mark.usefixtures("_every_thread_takes_part")
def test_many_callers_at_once_get_their_own_replies(bundle: WorkerBundle) -> None:
    engine = VnniEngine(bundle, threads=2)

    def evaluate(number: int) -> bool:
        name = list(SHAPES)[number % len(SHAPES)]
        weight = extreme_weight(*SHAPES[name])
        planes = extreme_planes(3, 1 + number, weight.shape[0], seed=number)
        return bool((engine.evaluate(f"{name}.forward", planes) == encrypted_linear_reference(planes, weight, 16)).all())

    with ThreadPoolExecutor(8) as callers:
        assert all(callers.map(evaluate, range(64)))


@needs_vnni
@pytest.mark.parametrize("features", [1, 4, 7, 260])
def test_packing_reads_either_orientation(features: int) -> None:
    weight = np.random.default_rng(features).integers(0, 256, (features, 70), dtype=np.uint8)
    quads = -(-features // 4)
    padded = np.zeros((4 * quads, 70), dtype=np.uint8)
    padded[:features] = weight
    for first, valid in ((0, 64), (64, 6)):
        columns = padded[:, first : first + valid].reshape(quads, 4, valid)
        expected = (columns.astype(np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]).sum(axis=1)
        for stored, transposed in ((weight, False), (np.ascontiguousarray(weight.T), True)):
            packed = aligned((quads, vnni_tile.PANEL))
            vnni_kernel.pack_panel(stored, transposed, first, valid, packed)
            np.testing.assert_array_equal(packed[:, :valid], expected)


def test_scratch_starts_at_a_cache_line() -> None:
    assert all(aligned((1, size, 64)).ctypes.data % 64 == 0 for size in range(1, 9))


@pytest.mark.parametrize("limbs", [1, 2, 3, 4])
@pytest.mark.parametrize(("tokens", "out_features"), [(1, 64), (255, 64), (4096, 64), (4096, 2048), (1000, 7)])
def test_blocks_are_whole_tiles_and_cover_every_token(limbs: int, tokens: int, out_features: int) -> None:
    for threads in (1, 2, 64):
        block = block_tokens(tokens, out_features, limbs, threads)
        assert block % vnni_tile.TILE_TOKENS[limbs] == 0
        assert block >= min(tokens, SMALLEST_BLOCK)
    assert block_tokens(4096, 64, limbs, 64) < 4096  # one panel for 64 threads: the tokens are shared out
    assert block_tokens(4096, 64 * 64, limbs, 2) >= 4096  # panels enough


@needs_vnni
def test_small_requests_wake_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path / "worker", {"wide": (extreme_weight(256, 512), 24, 16)})
    engine = VnniEngine(bundle, threads=3)
    woken = []
    submit = engine._pool.submit
    monkeypatch.setattr(engine._pool, "submit", lambda work: (woken.append(work), submit(work))[1])
    engine.evaluate("wide.forward", extreme_planes(3, 1, 256, seed=1))
    assert woken == []
    engine.evaluate("wide.forward", extreme_planes(3, 1024, 256, seed=1))
    assert len(woken) == 2


def test_threads_are_woken_for_work_that_is_worth_it() -> None:
    assert threads_worth(256 * 256, 1) == threads_worth(0, 0) == 1
    assert threads_worth(2048 * 2048, 512) > 2
    assert threads_worth(2048 * 2048, 4096) > threads_worth(2048 * 2048, 512)


@pytest.mark.parametrize(("fast", "name"), [(True, "torch"), (False, "onnxruntime")])
def test_without_the_instructions_the_default_is_another(
    bundle: WorkerBundle, monkeypatch: pytest.MonkeyPatch, fast: bool, name: str
) -> None:
    monkeypatch.setattr(vnni_kernel, "supported", lambda: False)
    monkeypatch.setattr(vnni_engine, "supported", lambda: False)
    monkeypatch.setattr(engines, "int8_products_are_fast", lambda: fast)
    assert create_engine("auto", bundle).name == name
    with pytest.raises(WorkerError, match="this CPU has no AVX512-VNNI; use the engine onnxruntime or torch"):
        create_engine("vnni", bundle)


@needs_vnni
def test_with_them_it_is_vnni(bundle: WorkerBundle) -> None:
    assert create_engine("auto", bundle).name == "vnni"
