"""The benchmark suite: what it stores and assembles, that its sections run the client's real code, and its arithmetic.

No test looks at a time.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import SECTIONS, report, timing
from benchmarks.client import client_saved
from benchmarks.crypto import crypto
from benchmarks.crypto.client_path import PATHS
from benchmarks.training.step import bytes_table
from benchmarks.training.stepping import Side, Steps, text_of_length
from benchmarks.worker.linears import engine_of, public_matrix, random_linear, random_rows, relative_error, stored_hint
from hecompile.he.parameters import CATALOGUE
from hecompile.inspection.linear import Traffic
from hecompile.models import TINY_LLAMA
from hecompile.runtime.client.session import DEFAULT_ENGINE


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HECOMPILE_BENCHMARK_RESULTS", str(tmp_path))
    yield tmp_path


def section(text: str) -> SimpleNamespace:
    return SimpleNamespace(run=lambda quick: text)


def test_sections_are_kept_in_order_when_one_is_run_again(results: Path) -> None:
    first, second, *_ = SECTIONS
    report.store_section(second, section("## Second\n\nearlier"), quick=False)  # type: ignore[arg-type]
    report.store_section(first, section("## First"), quick=False)  # type: ignore[arg-type]
    report.store_section(second, section("## Second\n\nlater"), quick=True)  # type: ignore[arg-type]
    page = (results / report.PAGE).read_text()
    assert page.index("## First") < page.index("## Second") and "later" in page and "earlier" not in page
    assert f"`python -m benchmarks {first}` at commit" in page and f"`python -m benchmarks --quick {second}`" in page
    for word in ("CPU", "cores", "memory", "instructions", "torch ", "numpy ", "numba ", "onnxruntime ", "Python "):
        assert word in page.split("## First")[0]


def test_a_section_that_fails_leaves_its_result(results: Path) -> None:
    name, *_ = SECTIONS
    report.store_section(name, section("## Kept"), quick=False)  # type: ignore[arg-type]

    def fail(quick: bool) -> str:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        report.store_section(name, SimpleNamespace(run=fail), quick=False)  # type: ignore[arg-type]
    assert "## Kept" in (results / report.PAGE).read_text()


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_has_what_the_page_needs(name: str) -> None:
    module = importlib.import_module(SECTIONS[name])
    assert module.__doc__ and callable(module.run)


def test_tables() -> None:
    text = report.table(["a", "b"], [["x", 1.5], ["y", 123456.0], ["z", "w"]])
    assert text.splitlines() == ["| a | b |", "|---|---:|", "| x | 1.5 |", "| y | 1.23e+05 |", "| z | w |"]
    with pytest.raises(ValueError, match="1 cells in a table of 2"):
        report.table(["a", "b"], [["x"]])


def test_crypto_section_shows_every_ring_and_a_small_error(results: Path) -> None:
    page = report.store_section("crypto", crypto, quick=True).read_text()
    for ring in CATALOGUE.values():
        assert f"| {ring.ring_dim} × {ring.rank} | trained | 1 |" in page
    errors = [float(row.split("|")[-2]) for row in page.splitlines() if "| trained |" in row]
    assert errors and max(errors) < 2e-3


def test_client_saved_section_has_a_row_per_width_and_a_plot(results: Path) -> None:
    page = report.store_section("client_saved", client_saved, quick=True).read_text()
    assert re.search(r"^\| 64 \| 256 \|", page, re.M) and re.search(r"^\| 128 \| 512 \|", page, re.M)
    assert (results / "client_saved.svg").stat().st_size > 1000


@pytest.mark.parametrize("name", list(PATHS))
def test_measured_path_computes_the_product_through_the_engine(name: str) -> None:
    linear, x = random_linear(96, 80), random_rows(20, 96)
    public = public_matrix(CATALOGUE["256x6"], 96)
    with stored_hint(public, linear, words=name != "trained") as hint, engine_of(linear, DEFAULT_ENGINE) as engine:
        path = PATHS[name]
        ciphertext, key = path.encrypt(public, x, linear.parameters)
        reply = torch.from_numpy(engine.evaluate("linear.forward", ciphertext.planes.numpy()))
        result = path.decrypt(key, hint, reply, linear.parameters)
    assert relative_error(result, x.double() @ linear.weight.double().t()) < 2e-3


def test_paired_runs_interleave_and_count() -> None:
    calls: list[str] = []
    samples = timing.paired({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2, warmup=1)
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert len(samples["a"].wall) == len(samples["b"].cpu) == 2
    assert timing.ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == 3.0


def side(seconds: list[list[float]]) -> Side:
    costs = {"client_crypto_seconds": 0.25, "worker_seconds": 0.5, "wire_seconds": 0.125, "tokens": 10.0}
    rounds = [[{"seconds": s, "bytes_up": 1010.0, "bytes_down": 500.0, **costs} for s in steps] for steps in seconds]
    return Side(rounds, cpu_seconds=1.0, peak=1, first_loss=1.0)


def test_step_figures() -> None:
    steps = Steps(side([[2.0, 4.0], [6.0, 6.0]]), side([[1.0, 1.0], [3.0, 3.0]]), 1.0, 1)
    assert steps.ratio == 2.5 and steps.encrypted.seconds == 5.0
    assert steps.split == {
        "client cryptography": 0.25,
        "client model and optimizer": 5.0 - 0.875,
        "worker": 0.5,
        "wire": 0.125,
    }
    text = bytes_table(SimpleNamespace(traffic=lambda: Traffic(100, 50)), steps.encrypted)  # type: ignore[arg-type]
    assert "| up | 100 | 101 | +1.00 % |" in text and "| both | 150 | 151 | +0.67 % |" in text


@pytest.mark.parametrize("length", [16, 48])
def test_texts_have_the_length_asked_for(length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    texts = [text_of_length(tokenizer, length, seed) for seed in range(3)]
    assert len(set(texts)) == 3 and all(len(tokenizer(text)["input_ids"]) + 1 == length for text in texts)
