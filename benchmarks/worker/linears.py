"""Make frozen linears of any shape outside a model: weights, parameters, hints and bundles, as the compiler makes them.

The rows of a trained or initialised linear are close to normal. Random normal weights therefore have the norms, and with
them the scales and the noise, of real ones.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler.worker_bundle_writer import WorkerBundleWriter
from hecompile.he.hints import Hint, HintStore, write_hint
from hecompile.he.parameters import LinearParameters, RingParameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import PublicSeed
from hecompile.he.setup import setup
from hecompile.passes.offload.lower_worker import LowerWorker
from hecompile.passes.offload.quantize import quantize_weight
from hecompile.plan.encrypted_linear import encrypted_linear_model
from hecompile.runtime.worker.engines import Engine, create_engine

UPLOAD_LIMBS, REPLY_BYTES = 3, 2
"""What parameter selection takes for most linears of a 1B model with 8-bit weights, at precision 8."""

WEIGHT_BITS = 8
PLAN_ID = "be" * 16
_SAMPLED_ROWS = 256


@dataclass(frozen=True)
class Linear:
    """Hold a quantised linear: its int8 weight [out, in], and the parameters of its encryption."""

    weight: Tensor
    parameters: LinearParameters


def random_linear(in_features: int, out_features: int, seed: int = 0) -> Linear:
    """Draw normal weights and quantise them as `hecompile.passes.offload.quantize` does."""
    generator = torch.Generator().manual_seed(seed)
    weight, _ = quantize_weight(torch.randn(out_features, in_features, generator=generator).numpy(), WEIGHT_BITS)
    matrix = torch.from_numpy(weight)
    return Linear(matrix, LinearParameters.from_weight(matrix, 8 * UPLOAD_LIMBS, 8 * REPLY_BYTES))


def parameters_of_shape(in_features: int, out_features: int) -> LinearParameters:
    """Estimate the parameters of such a linear from a sample of its rows, where all its weights would not fit in memory."""
    sample = random_linear(in_features, min(out_features, _SAMPLED_ROWS)).parameters
    slack = 1.05  # the largest norm of all rows is a little above that of the sample
    return LinearParameters(
        in_features, out_features, int(slack * sample.max_l1), slack * sample.max_l2, sample.upload_bits, sample.reply_bits
    )


def random_rows(tokens: int, features: int, seed: int = 1) -> Tensor:
    """Draw activations f32 [T, features]: normal, each token of its own size, one feature in a hundred ten times larger."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator) * torch.rand(tokens, 1, generator=generator).add_(0.5)
    x[:, :: max(1, min(100, features - 1))] *= 10.0
    return x


def public_matrix(ring: RingParameters, rows: int) -> PublicMatrix:
    return PublicMatrix(ring, PublicSeed.from_hex("b0" * 32), rows)


@contextmanager
def stored_hint(public: PublicMatrix, linear: Linear, words: bool = False) -> Iterator[Hint]:
    """Make a linear's hint by setup, write it, and read it back as training does; with `words`, as words in any case."""
    precision = np.float64 if words else linear.parameters.decryption_precision
    with _stored(public.params, setup(linear.weight, public), precision) as hint:
        yield hint


@contextmanager
def random_hint(ring: RingParameters, parameters: LinearParameters) -> Iterator[Hint]:
    """Put uniform values in a hint's place, where setup for the real one would take too long.

    Timing does not depend on them; the decrypted values are meaningless.
    """
    generator = torch.Generator().manual_seed(2)
    shape = (parameters.out_features, ring.lattice_dim)
    values = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)
    with _stored(ring, values, parameters.decryption_precision) as hint:
        yield hint


@contextmanager
def _stored(ring: RingParameters, hint: Tensor, precision: type[np.floating]) -> Iterator[Hint]:
    single = ring if precision is np.float32 else None
    with tempfile.TemporaryDirectory() as scratch:
        write_hint(Path(scratch), "linear", hint, single)
        # Nothing cached: in a model of real size the hints do not fit in memory.
        yield HintStore(Path(scratch), ring, cache_bytes=0).hint("linear", len(hint), precision)


@contextmanager
def engine_of(linear: Linear, engine: str) -> Iterator[Engine]:
    """Create a worker's engine over a bundle that holds this linear as `linear.forward`."""
    parameters = linear.parameters
    weight = linear.weight.t().contiguous().numpy()  # int8 [in, out]
    with tempfile.TemporaryDirectory() as scratch:
        circuit = encrypted_linear_model(weight, parameters.upload_bits, parameters.reply_bits, "linear.forward")
        yield create_engine(engine, _write_circuits(Path(scratch) / "worker", [circuit]))


def llama_layer(hidden: int) -> dict[str, tuple[int, int]]:
    """Return (in, out) of the circuits of a decoder layer of the Llama-3 family: q, k, v share an upload, as do gate and up.

    Key and value have a quarter of the heads, ffn = 4 × hidden; Llama-3.2-1B has hidden 2048.
    """
    return {
        "qkv": (hidden, hidden + hidden // 2), "o": (hidden, hidden),
        "gate_up": (hidden, 8 * hidden), "down": (4 * hidden, hidden),
    }  # fmt: skip


def write_random_bundle(directory: Path, linears: dict[str, tuple[int, int]]) -> WorkerBundle:
    """Write a worker bundle with random int8 weights, both directions.

    linears: name → (in, out) of its forward circuit.
    """
    return _write_circuits(directory, _random_circuits(linears))


def _random_circuits(linears: dict[str, tuple[int, int]]) -> Iterator[ir.Model]:
    rng = np.random.default_rng(0)
    for name, shape in linears.items():
        weight = rng.integers(-127, 128, shape, dtype=np.int8)
        for direction, matrix in (("forward", weight), ("backward", weight.T)):
            yield encrypted_linear_model(matrix, 8 * UPLOAD_LIMBS, 8 * REPLY_BYTES, f"{name}.{direction}")


def _write_circuits(directory: Path, circuits: Iterable[ir.Model]) -> WorkerBundle:
    with WorkerBundleWriter(directory, PLAN_ID) as writer:
        for circuit in circuits:
            writer.add(LowerWorker()(circuit).model)
        return writer.commit()


def random_planes(tokens: int, features: int) -> np.ndarray:
    """Draw uint8 [UPLOAD_LIMBS, tokens, features]: as a ciphertext looks to who has no key."""
    return np.random.default_rng(tokens).integers(0, 256, (UPLOAD_LIMBS, tokens, features), dtype=np.uint8)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Return the root mean square of the difference over that of the exact values."""
    return math.sqrt(float((result.double() - exact).square().mean() / exact.square().mean()))
