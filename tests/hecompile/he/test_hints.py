"""The public matrix, setup, and hints on disk and in the cache."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from hecompile.errors import InputError
from hecompile.he import hints as hints_module
from hecompile.he import setup as setup_code  # `setup_module` would be a hook of pytest
from hecompile.he.hints import Hint, HintStore, write_hint
from hecompile.he.kernels.transform import deinterleave, interleave
from hecompile.he.parameters import CATALOGUE, test_insecure_parameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import PublicSeed
from hecompile.he.setup import limb_product_is_exact, multiply_by_limbs, multiply_in_float64, setup

SEED = PublicSeed(bytes(range(32)))
TOY = test_insecure_parameters(16, 2)


def random_weight(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)


def test_rows_do_not_depend_on_how_many_there_are() -> None:
    few, many = PublicMatrix(TOY, SEED, 3), PublicMatrix(TOY, SEED, 50)
    assert torch.equal(few.coefficients(slice(0, 3)), many.coefficients(slice(0, 3)))
    assert torch.equal(many.coefficients(slice(7, 9)), many.coefficients(slice(0, 50))[7:9])
    assert torch.equal(few.fft(slice(0, 3)), many.fft(slice(0, 3)))


def test_lazy_expansion_in_any_order() -> None:
    params = test_insecure_parameters(2048, 1)
    at_once, piecewise = PublicMatrix(params, SEED, 150), PublicMatrix(params, SEED, 150)
    for rows in (5, 3, 71, 72, 150):
        piecewise.transformed(rows)
    assert np.array_equal(at_once.transformed(150), piecewise.transformed(150))


@pytest.mark.parametrize("ring_dim", [16, 32, 128, 256, 512, 1024, 2048])
def test_kernel_transform_agrees_with_the_torch_transform(ring_dim: int) -> None:
    params = test_insecure_parameters(ring_dim, 1)
    public = PublicMatrix(params, SEED, 8)
    values = public.transformed(8).reshape(ring_dim // 2, 2, 8)
    reference = public.fft(slice(0, 8))[0].numpy()  # [8, d/2], in another order
    for lane in range(8):
        own = np.sort_complex(values[:, 0, lane] + 1j * values[:, 1, lane])
        assert np.abs(own - np.sort_complex(reference[lane])).max() < 1e-14 * np.abs(own).max() * ring_dim


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 40])
def test_interleaving_and_back(rows: int) -> None:
    words = torch.arange(rows * 6, dtype=torch.int32).view(rows, 6)
    side_by_side = interleave(words)
    assert side_by_side.shape == (-(-rows // 8) * 8 * 6,)
    assert side_by_side[:8].tolist() == [6 * row if row < rows else 0 for row in range(8)]
    assert np.array_equal(deinterleave(side_by_side, slice(0, rows), 6), words.numpy())
    assert np.array_equal(deinterleave(side_by_side, slice(rows - 1, rows), 6), words[-1:].numpy())


def test_another_seed_gives_another_matrix() -> None:
    one = PublicMatrix(TOY, SEED, 4).coefficients(slice(0, 4))
    other = PublicMatrix(TOY, SEED.derive("other"), 4).coefficients(slice(0, 4))
    assert not (one == other).any()


def test_entries_are_uniform() -> None:
    rows = PublicMatrix(CATALOGUE["512x3"], SEED, 192).coefficients(slice(0, 192))
    words = rows[torch.arange(192) // 8 % 3 == 0].numpy().view(np.uint8)  # the other rows are made of the same words
    counts = np.bincount(words.ravel(), minlength=256)
    expected = words.size / 256
    # fixed data: 255 degrees of freedom have mean 255 and standard deviation 22.6
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * 22.6


def test_empty_matrix_is_refused() -> None:
    with pytest.raises(InputError, match="at least one row"):
        PublicMatrix(TOY, SEED, 0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (17, 33, 32), (40, 300, 24)])
@pytest.mark.parametrize("extreme", [False, True])
def test_both_products_agree_with_python_integers(shape: tuple[int, int, int], extreme: bool) -> None:
    rows, inner, columns = shape
    weight, matrix = random_weight(rows, inner), torch.full((inner, columns), -(2**31), dtype=torch.int32)
    if extreme:
        weight[:] = -128
        matrix[:, 1::2] = 2**31 - 1
    else:
        generator = torch.Generator().manual_seed(4)
        matrix = torch.randint(-(2**31), 2**31, (inner, columns), generator=generator).to(torch.int32)
    exact = weight.numpy().astype(object) @ matrix.numpy().astype(object)
    wanted = torch.from_numpy(((exact + 2**31) % 2**32 - 2**31).astype(np.int32))
    assert torch.equal(multiply_in_float64(weight, matrix), wanted)
    assert not limb_product_is_exact() or torch.equal(multiply_by_limbs(weight, matrix), wanted)


def test_float64_product_is_exact_at_its_widest() -> None:
    weight = torch.full((1, 2**15), -128, dtype=torch.int8)
    matrix = torch.full((2**15, 2), -(2**31), dtype=torch.int32)
    weight[0, -1], matrix[-1, 0], matrix[0, 1] = -127, 2**31 - 1, 2**31 - 1
    exact = weight.numpy().astype(object) @ matrix.numpy().astype(object)
    wanted = ((exact + 2**31) % 2**32 - 2**31).astype(np.int64)
    assert multiply_in_float64(weight, matrix).tolist() == wanted.tolist()


@pytest.mark.parametrize("exact_limbs", [True, False])
def test_setup_in_chunks(monkeypatch: pytest.MonkeyPatch, exact_limbs: bool) -> None:
    weight, public = random_weight(21, 30), PublicMatrix(TOY, SEED, 40)
    wanted = multiply_in_float64(weight, public.coefficients(slice(0, 30)).flatten(1))
    monkeypatch.setattr(setup_code, "_CHUNK_IN", 8)
    monkeypatch.setattr(setup_code, "_CHUNK_OUT", 6)
    monkeypatch.setattr(setup_code, "limb_product_is_exact", lambda: exact_limbs and limb_product_is_exact())
    monkeypatch.setattr(setup_code, "int8_products_are_fast", lambda: True)
    assert torch.equal(setup(weight, public), wanted)


def test_inexact_int8_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch._int_mm

    def saturating(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return right(a, b, out=out).clamp_(-500_000, 500_000)

    def missing(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not implemented")

    for broken in (saturating, missing):
        monkeypatch.setattr(torch, "_int_mm", broken)
        assert not limb_product_is_exact.__wrapped__()


@pytest.mark.parametrize(
    "weight", [torch.zeros(2, 5, dtype=torch.int8), torch.zeros(2, 4), torch.zeros(4, dtype=torch.int8)]
)
def test_setup_refuses_what_it_cannot_multiply(weight: torch.Tensor) -> None:
    with pytest.raises(InputError, match="weight"):
        setup(weight, PublicMatrix(TOY, SEED, 4))


def test_hint_file_round_trip(tmp_path: Path) -> None:
    hint = setup(random_weight(5, 4), PublicMatrix(TOY, SEED, 4))
    path = write_hint(tmp_path / "hints", "model.layers.0.mlp.down_proj.forward", hint)
    assert path.name == "model.layers.0.mlp.down_proj.forward.npy"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    opened = HintStore(path.parent, TOY, cache_bytes=0).hint("model.layers.0.mlp.down_proj.forward", 5)
    assert opened.rows == 5
    assert torch.equal(opened.coefficients(slice(0, 5)), hint)
    assert torch.equal(opened.fft(slice(1, 4)), Hint.from_coefficients(TOY, hint).fft(slice(0, 5))[:, 1:4])


def test_all_transforms_are_kept_or_none(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_hint(tmp_path, name, setup(random_weight(5, 4), PublicMatrix(TOY, SEED, 4)))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    for cache_bytes, kept in ((2 * size, True), (2 * size - 1, False)):
        store = HintStore(tmp_path, TOY, cache_bytes)
        hints = [store.hint(name, 5) for name in ("a", "b", "c")]
        assert [hint.transformed is not None for hint in hints] == [kept] * 3
        assert store.hint("c", 5) is hints[2]


def test_hints_are_read_in_the_order_of_the_last_visit_and_let_go_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"circuit{i}" for i in range(7)]
    for name in names:
        write_hint(tmp_path, name, setup(random_weight(5, 4), PublicMatrix(TOY, SEED, 4)))
    store = HintStore(tmp_path, TOY, cache_bytes=0)
    for _ in range(2):  # the second round knows the order
        for name in names:
            words = store.hint(name, 5).words
            before = words.copy()
            store.release(name)
            assert np.array_equal(words, before), "a released hint reads as before"
    asked: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def madvise(self, advice: int) -> None:
            asked.append(f"{self.name} {'read' if advice == mmap.MADV_WILLNEED else 'drop'}")

    monkeypatch.setattr(store, "_maps", {name: Recorder(name) for name in names})
    store.hint("circuit0", 5)
    store.release("circuit0")
    assert asked == [f"circuit{i} read" for i in (1, 2, 3, 4)] + ["circuit0 drop"]


def test_interrupted_write_leaves_the_old_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hint = torch.ones(2, 32, dtype=torch.int32)
    write_hint(tmp_path, "a", hint)

    def full_disk(file: object, array: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("no space left")

    monkeypatch.setattr(hints_module.np, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_hint(tmp_path, "a", hint * 2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
    assert torch.equal(HintStore(tmp_path, TOY, 0).hint("a", 2).coefficients(slice(0, 2)), hint)


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", ".hidden", "a b", "a\n"])
def test_circuit_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="name a circuit"):
        write_hint(tmp_path, name, torch.zeros(1, 32, dtype=torch.int32))
    with pytest.raises(InputError, match="name a circuit"):
        HintStore(tmp_path, TOY, 0).hint(name, 1)


def test_missing_damaged_and_foreign_hints_are_refused(tmp_path: Path) -> None:
    store = HintStore(tmp_path, TOY, 1 << 20)
    with pytest.raises(InputError, match="no hint for a"):
        store.hint("a", 3)
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY damaged")
    with pytest.raises(InputError, match="cannot be read"):
        store.hint("a", 3)
    write_hint(tmp_path, "a", torch.zeros(3, 48, dtype=torch.int32))
    with pytest.raises(InputError, match="run setup again"):
        store.hint("a", 3)
    with pytest.raises(InputError, match="int32"):
        write_hint(tmp_path, "a", torch.zeros(3, 32))
