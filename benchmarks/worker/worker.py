"""Measure the worker: an encrypted product against the plaintext float32 one, and resident memory against the weights.

    python -m benchmarks worker [--quick]

Each row is one circuit of a real bundle, asked of the engines that serve (`create_engine`): three byte planes in, two out,
random int8 weights. Every round runs float32, int8 and the engines one after the other, the order turned from round to
round; figures are medians, ratios are medians of the rounds' ratios. float32 is the plaintext product of as many
tokens, int8 (on processors that have a kernel for it) is one `torch._int_mm` into memory that is there already: three of
those would be the price of three limbs with everything around them free. The memory is that of `hecompile worker serve`,
a process of its own, over a bundle of Llama-3.2-1B's linears, after every circuit was asked forward and backward.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import table
from benchmarks.timing import paired, ratio, resident_bytes
from benchmarks.worker.linears import REPLY_BYTES, UPLOAD_LIMBS, llama_layer, random_planes, write_random_bundle
from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.worker import WorkerBundle
from hecompile.integers import int8_products_are_fast
from hecompile.runtime.transports import connect, open_connection
from hecompile.runtime.worker.engines import Engine, create_engine
from hecompile.runtime.worker.engines.vnni_kernel import supported
from hecompile.runtime.worker.process import running_worker

SHAPES = [(2048, 2048), (2048, 8192), (8192, 2048)]
TOKENS = [256, 1024, 2048]
CHECKED_TOKENS = 2
ROW_SECONDS = 30.0
"""No round of a row begins later than this, but three are always taken."""

MEMORY_TOKENS = 1024
MIB = 1 << 20


def run(quick: bool) -> str:
    """Return the section as Markdown. quick: fewer shapes and rounds, one layer of 16; its figures are no measurement."""
    engines = [*(["vnni"] if supported() else []), *(["torch"] if int8_products_are_fast() else []), "onnxruntime"]
    return "\n\n".join(["## Worker", _speed(engines, quick), _memory(engines, quick)])


def _speed(engines: list[str], quick: bool) -> str:
    plain = _plain()
    ratios = [f"{name} / {what}" for name in engines for what in plain]
    headings = ["in × out", "direction", "tokens", *(f"{name} ms" for name in (*plain, *engines)), *ratios]
    lines: list[list[object]] = []
    shapes, tokens, rounds = ([(512, 1024)], [64, 256], 3) if quick else (SHAPES, TOKENS, 15)
    for in_features, out_features in shapes:
        with tempfile.TemporaryDirectory() as directory:
            bundle = write_random_bundle(Path(directory) / "worker", {"linear": (in_features, out_features)})
            made = {name: create_engine(name, bundle) for name in engines}
            for direction in ("forward", "backward"):
                lines += [_row(bundle, made, direction, count, rounds) for count in tokens]
    return (
        f"An encrypted linear ({UPLOAD_LIMBS} bytes up, {REPLY_BYTES} down per value), wire bytes in and out included, on "
        f"{torch.get_num_threads()} threads. A backward row multiplies by the transpose: its inner dimension is `out`.\n\n"
        + table(headings, lines)
    )


def _plain() -> tuple[str, ...]:
    """Name the products that encrypted ones are compared with: int8 only where it has a kernel, else it takes seconds."""
    return ("float32", "int8") if int8_products_are_fast() else ("float32",)


def _row(bundle: WorkerBundle, engines: dict[str, Engine], direction: str, tokens: int, rounds: int) -> list[object]:
    circuit = f"linear.{direction}"
    spec = bundle.circuits[circuit]
    planes = random_planes(tokens, spec.in_features)
    matrix = torch.from_numpy(
        np.array(bundle.weight("linear.forward"))
    )  # int8 [in, out], as the forward circuit has it
    real = matrix.t().float().contiguous()  # [out, in], as a module has it
    right = matrix if direction == "forward" else matrix.t()
    x = torch.randn(tokens, spec.in_features)
    digits = torch.randint(-128, 128, (tokens, spec.in_features), dtype=torch.int8)
    products = torch.empty(tokens, spec.out_features, dtype=torch.int32)
    plain: dict[str, Callable[[], object]] = {
        "float32": lambda: x @ (real.t() if direction == "forward" else real),
        "int8": lambda: torch._int_mm(digits, right, out=products),
    }
    functions = {name: plain[name] for name in _plain()}
    for name, engine in engines.items():
        _check(engine, circuit, planes, bundle)
        functions[name] = partial(engine.evaluate, circuit, planes)
    times = paired(functions, rounds, budget_seconds=ROW_SECONDS)
    cells = [f"{1e3 * samples.seconds:.1f}" for samples in times.values()]
    for name in engines:
        cells += [f"{ratio(times[name].wall, times[what].wall):.2f}" for what in _plain()]
    size = f"{bundle.circuits['linear.forward'].in_features} × {bundle.circuits['linear.forward'].out_features}"
    return [size, direction, tokens, *cells]


def _check(engine: Engine, circuit: str, planes: np.ndarray, bundle: WorkerBundle) -> None:
    """Raise RuntimeError for a wrong reply, whose time would mean nothing."""
    reply = engine.evaluate(circuit, planes)
    expected = encrypted_linear_reference(planes[:, :CHECKED_TOKENS], bundle.weight(circuit), 8 * REPLY_BYTES)
    if not np.array_equal(reply[:, :CHECKED_TOKENS], expected):
        raise RuntimeError(f"engine {engine.name} computes {circuit} wrongly")


def _memory(engines: list[str], quick: bool) -> str:
    layers = 1 if quick else 16
    headings = ["engine", "int8 weights", "one batch", "at the start", "after forward", "and backward", "/ weights"]
    lines: list[list[object]] = []
    with tempfile.TemporaryDirectory() as directory:
        linears = {f"layer_{i}.{name}": shape for i in range(layers) for name, shape in llama_layer(2048).items()}
        bundle = write_random_bundle(Path(directory) / "worker", linears)
        weights = sum(rows * columns for rows, columns in linears.values())
        batch = max(MEMORY_TOKENS * (UPLOAD_LIMBS * rows + REPLY_BYTES * columns) for rows, columns in linears.values())
        for name in engines:
            start, forward, both = worker_memory(bundle, name)
            cells = [weights, batch, start, forward, both]
            lines.append([name, *(f"{cell / MIB:.0f} MiB" for cell in cells), f"{(both - batch) / weights:.2f}"])
    return (
        f"Resident memory of a worker process that serves {layers} layers of Llama-3.2-1B, requests of "
        f"{MEMORY_TOKENS} tokens (the last column without the batch). The weights of `vnni` and `torch` "
        "are mapped files, one for both directions; ONNX Runtime keeps one repacked copy of each direction.\n\n"
        + table(headings, lines)
    )


def worker_memory(bundle: WorkerBundle, engine: str) -> tuple[int, int, int]:
    """Return resident bytes of a worker process: when it listens, after all forward circuits, after all backward ones."""
    with running_worker(bundle.directory, ("--engine", engine)) as (process, address):
        transport = connect(address)
        with contextlib.closing(transport):
            sizes = [resident_bytes(process.pid)[0]]
            open_connection(transport, bundle.plan_id)
            for direction in ("forward", "backward"):
                for spec in bundle.circuits.values():
                    if spec.linear != spec.name and spec.direction == direction:
                        transport.evaluate(spec.name, random_planes(MEMORY_TOKENS, spec.in_features))
                sizes.append(resident_bytes(process.pid)[0])
    return sizes[0], sizes[1], sizes[2]
