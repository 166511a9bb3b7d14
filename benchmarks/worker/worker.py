"""The worker: an encrypted product against the plaintext float32 one, and resident memory against the weights.

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
from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler.worker_bundle_writer import WorkerBundleWriter
from hecompile.integers import int8_products_are_fast
from hecompile.passes.offload.lower_worker import LowerWorker
from hecompile.plan.encrypted_linear import encrypted_linear_model
from hecompile.runtime.transports import connect, open_connection
from hecompile.runtime.worker.engines import Engine, create_engine
from hecompile.runtime.worker.engines.vnni_kernel import supported
from hecompile.runtime.worker.process import running_worker

LIMBS, REPLY_BYTES = 3, 2
PLAN_ID = "be" * 16
SHAPES = [(2048, 2048), (2048, 8192), (8192, 2048)]
TOKENS = [256, 1024, 2048]
CHECKED_TOKENS = 2
LAYER = {"qkv": (2048, 3072), "o": (2048, 2048), "gate_up": (2048, 16384), "down": (8192, 2048)}
"""(in, out) of the circuits of one decoder layer of Llama-3.2-1B: q, k, v share an upload, and so do gate and up."""

ROW_SECONDS = 30.0
"""No round of a row begins later than this, but three are always taken."""

MEMORY_TOKENS = 1024
MIB = 1 << 20


def run(quick: bool) -> str:
    """The section as Markdown. quick: fewer shapes and rounds, one layer instead of 16; its figures are no measurement."""
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
            bundle = write_bundle(Path(directory) / "worker", {"linear": (in_features, out_features)})
            made = {name: create_engine(name, bundle) for name in engines}
            for direction in ("forward", "backward"):
                lines += [_row(bundle, made, direction, count, rounds) for count in tokens]
    return (
        f"An encrypted linear ({LIMBS} bytes up, {REPLY_BYTES} down per value), wire bytes in and out included, on "
        f"{torch.get_num_threads()} threads. A backward row multiplies by the transpose: its inner dimension is `out`.\n\n"
        + table(headings, lines)
    )


def _plain() -> tuple[str, ...]:
    """What encrypted products are compared with; not with a product of int8 that has no kernel here and takes seconds."""
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
    """A time is only worth something for the right reply. Raises RuntimeError for a wrong one."""
    reply = engine.evaluate(circuit, planes)
    expected = encrypted_linear_reference(planes[:, :CHECKED_TOKENS], bundle.weight(circuit), REPLY_BYTES)
    if not np.array_equal(reply[:, :CHECKED_TOKENS], expected):
        raise RuntimeError(f"engine {engine.name} computes {circuit} wrongly")


def _memory(engines: list[str], quick: bool) -> str:
    layers = 1 if quick else 16
    headings = ["engine", "int8 weights", "one batch", "at the start", "after forward", "and backward", "/ weights"]
    lines: list[list[object]] = []
    with tempfile.TemporaryDirectory() as directory:
        linears = {f"layer_{i}.{name}": shape for i in range(layers) for name, shape in LAYER.items()}
        bundle = write_bundle(Path(directory) / "worker", linears)
        weights = sum(rows * columns for rows, columns in linears.values())
        batch = max(MEMORY_TOKENS * (LIMBS * rows + REPLY_BYTES * columns) for rows, columns in linears.values())
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
    """Resident bytes of a worker process: when it listens, after every forward circuit, after every backward one too."""
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


def write_bundle(directory: Path, linears: dict[str, tuple[int, int]]) -> WorkerBundle:
    """linears: name → (in, out) of its forward circuit. Random int8 weights, both directions."""
    rng = np.random.default_rng(0)
    with WorkerBundleWriter(directory, PLAN_ID) as writer:
        for name, shape in linears.items():
            weight = rng.integers(-127, 128, shape, dtype=np.int8)
            for direction, matrix in (("forward", weight), ("backward", weight.T)):
                model = encrypted_linear_model(matrix, LIMBS, REPLY_BYTES, f"{name}.{direction}")
                writer.add(LowerWorker()(model).model)
        return writer.commit()


def random_planes(tokens: int, features: int) -> np.ndarray:
    """uint8 [LIMBS, tokens, features]: what a ciphertext looks like to who has no key."""
    return np.random.default_rng(tokens).integers(0, 256, (LIMBS, tokens, features), dtype=np.uint8)
