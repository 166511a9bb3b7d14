"""Check the GPU engine at extreme values, and time its products against bfloat16 and int8 ones of the same shape.

    python -m benchmarks gpu [--quick]

Each row is one circuit of Llama-3.2-1B asked of the engine `torch-cuda`, three byte planes up and two down. *engine* is from
the request in host memory to the reply in host memory, what a worker does; *product* is the same between tensors on the
device, which is what a bfloat16 linear of a plaintext step does and so what it is compared with. int8 is one
`torch._int_mm`, three of which would be the price of three limbs with everything around them free. Medians of
interleaved rounds, each call followed by a synchronisation.

Where there is no CUDA device nothing is timed: the same code runs on the CPU, its replies are compared with exact ones, and
the section says what was not run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import table
from benchmarks.timing import paired, ratio
from benchmarks.worker.linears import REPLY_BYTES, llama_layer, random_planes, write_random_bundle
from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.worker import WorkerBundle
from hecompile.runtime.worker.engines.cuda_engine import CudaEngine
from hecompile.runtime.worker.engines.torch_engine import readable

TOKENS, QUICK_TOKENS = (512, 2048, 8192), (64,)
ROUNDS, QUICK_ROUNDS = 15, 3
LAYERS = 16
SMALL_LAYER = {"qkv": (64, 96), "down": (256, 64)}
"""Shapes for a quick run and for the CPU, which has no business with the large ones here."""

CHECKED_TOKENS = 4
NOT_RUN = (
    "**Not run: torch finds no CUDA device.** What ran instead is the engine's own code on the CPU: its replies at extreme "
    "values are those of exact integer arithmetic for {circuits} circuits. Not run: the CUDA copies and streams, "
    "cuBLASLt's int8 products, the Triton kernels as compiled code, and every time."
)


def run(quick: bool) -> str:
    """Return the section as Markdown. Raises RuntimeError for a reply that is not exact."""
    on_gpu = torch.cuda.is_available()
    linears = llama_layer(2048) if on_gpu and not quick else SMALL_LAYER
    with tempfile.TemporaryDirectory() as scratch:
        bundle = write_random_bundle(Path(scratch) / "worker", linears)
        engine = CudaEngine(bundle, "cuda" if on_gpu else "cpu")
        names = [spec.name for spec in bundle.circuits.values() if spec.linear != spec.name]
        for name in names:
            check_extremes(engine, bundle, name)
        if not on_gpu:
            return "## GPU\n\n" + NOT_RUN.format(circuits=len(names))
        tokens, rounds = (QUICK_TOKENS, QUICK_ROUNDS) if quick else (TOKENS, ROUNDS)
        return "## GPU\n\n" + _speed(engine, bundle, names, tokens, rounds)


def check_extremes(engine: CudaEngine, bundle: WorkerBundle, circuit: str) -> None:
    """Raise RuntimeError unless the replies to all-255, all-0, all-128 and uniform bytes are exact."""
    planes = random_planes(CHECKED_TOKENS, bundle.circuits[circuit].in_features)
    planes[:, 0], planes[:, 1], planes[:, 2] = 255, 0, 128
    expected = encrypted_linear_reference(planes, bundle.weight(circuit), 8 * REPLY_BYTES)
    if not np.array_equal(engine.evaluate(circuit, planes), expected):
        raise RuntimeError(f"engine {engine.name} computes {circuit} wrongly")


def _speed(engine: CudaEngine, bundle: WorkerBundle, names: list[str], tokens: tuple[int, ...], rounds: int) -> str:
    headings = ["circuit", "in × out", "tokens", "engine ms", "product ms", "bfloat16 ms", "int8 ms"]
    headings += ["product / bfloat16", "product / int8", "int8 TOP/s"]
    lines: list[list[object]] = []
    totals = dict.fromkeys(tokens, 0.0)
    for name in names:
        for count in tokens:
            row, seconds = _row(engine, bundle, name, count, rounds)
            lines.append(row)
            totals[count] += LAYERS * seconds
    plan = [[count, f"{count / seconds:.0f}"] for count, seconds in totals.items()]
    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}. Replies at extreme values "
        f"are exact for all circuits.\n\n{table(headings, lines)}\n\n"
        f"The circuits of {LAYERS} layers, forward and backward, host to host:\n\n{table(['tokens', 'tokens/s'], plan)}"
    )


def _row(
    engine: CudaEngine, bundle: WorkerBundle, circuit: str, tokens: int, rounds: int
) -> tuple[list[object], float]:
    """Measure one circuit: the cells of its row, and the seconds of the engine."""
    spec = bundle.circuits[circuit]
    planes = random_planes(tokens, spec.in_features)
    product = device_product(engine, circuit, readable(planes))
    x = torch.randn(tokens, spec.in_features, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(spec.out_features, spec.in_features, dtype=torch.bfloat16, device="cuda")
    digits = torch.randint(-128, 128, (tokens, spec.in_features), dtype=torch.int8, device="cuda")
    matrix = torch.randint(-128, 128, (spec.out_features, spec.in_features), dtype=torch.int8, device="cuda")
    functions = {
        "engine": lambda: engine.evaluate(circuit, planes),
        "product": synchronized(product),
        "bfloat16": synchronized(lambda: torch.nn.functional.linear(x, weight)),
        "int8": synchronized(lambda: torch._int_mm(digits, matrix.t())),
    }
    times = paired(functions, rounds, warmup=3)
    operations = 2 * tokens * spec.in_features * spec.out_features
    cells: list[object] = [circuit, f"{spec.in_features} × {spec.out_features}", tokens]
    cells += [f"{1e3 * samples.seconds:.3f}" for samples in times.values()]
    cells += [f"{ratio(times['product'].wall, times[what].wall):.2f}" for what in ("bfloat16", "int8")]
    return [*cells, f"{operations / times['int8'].seconds / 1e12:.0f}"], times["engine"].seconds


def device_product(engine: CudaEngine, circuit: str, planes: Tensor) -> Callable[[], Tensor]:
    """Return the work of `engine.evaluate` between its two copies, on planes uint8 [limbs, T, in] put on the device."""
    spec = engine._bundle.circuits[circuit]
    weight = engine._host[spec]
    resident = engine._on_device(weight)[: len(weight.digits)]
    there = planes.to(engine._device)
    return lambda: engine._product(there, spec, resident, weight.transposed)


def synchronized(function: Callable[[], object]) -> Callable[[], None]:
    """Return `function` followed by a synchronisation, so that its time is that of the device too."""

    def call() -> None:
        function()
        torch.cuda.synchronize()

    return call
