"""Compare one encrypted 2048-wide linear here, in concrete-ml-extensions and in TenSEAL, in one run.

Needs the `bench` extra: pip install -e ".[bench]" (Linux with glibc 2.34 or newer).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.crypto.client_path import TRAINED
from benchmarks.crypto.field_systems import ConcreteMl, System, TensealScalars, TensealTensor
from benchmarks.report import table
from benchmarks.timing import paired, ratio
from benchmarks.worker.linears import (
    Linear,
    engine_of,
    public_matrix,
    random_linear,
    random_rows,
    relative_error,
    stored_hint,
)
from hecompile.errors import InputError
from hecompile.he.hints import Hint
from hecompile.he.public_matrix import PublicMatrix
from hecompile.passes.offload.select_parameters import choose_ring
from hecompile.runtime.client.session import DEFAULT_ENGINE
from hecompile.runtime.worker.engines import Engine

WIDTH, TOKENS = 2048, 4096
SAMPLE_IN, SAMPLE_OUT = 64, 16
"""TenSEAL does one multiplication and addition per weight, so that its time is proportional to the weights."""

TARGETS = {"concrete-ml-extensions": 500_000, "TenSEAL, CKKSTensor.mm": 5_000}
PROSE = """\
## Against the field

One encrypted {width} × {width} linear, int8 weights, per token. *Server*: wall and CPU seconds of the worker; *client*:
wall seconds to encrypt and decrypt; bytes of the serialized messages; error: relative rms error to the exact product of the
real activations. Ours is the worker's engine `{engine}` on wire bytes, in and out, and the client's functions that training
calls, at {tokens} tokens. concrete-ml-extensions takes the tokens one after the other, so that one is measured, with 8-bit
activations. TenSEAL has 4096 tokens in the slots (degree 8192, 128 bits) and one ciphertext per feature; it was measured at
{sample_in} × {sample_out} features and extrapolated: server time in proportion to the weights, client time and bytes to the
features. Ours and theirs ran in turn in one process. The evaluation key that concrete-ml-extensions sends once is
{key:.0f} MB; our client keeps a hint of {hint:.1f} MB for this linear.
"""


class Ours(System):
    """Run this project's linear: the client's functions that training calls, and the worker's engine."""

    name = "hecompile"

    def __init__(self, x: Tensor, linear: Linear, public: PublicMatrix, hint: Hint, engine: Engine) -> None:
        super().__init__(x, linear.weight)
        self._parameters, self._public, self._hint, self._engine = linear.parameters, public, hint, engine

    def encrypt(self) -> None:
        ciphertext, self._key = TRAINED.encrypt(self._public, self.x, self._parameters)
        self._sent = ciphertext.planes.numpy()
        self.bytes_up = self._sent.nbytes

    def serve(self) -> None:
        self._reply = self._engine.evaluate("linear.forward", self._sent)

    def decrypt(self) -> Tensor:
        self.bytes_down = self._reply.nbytes
        return TRAINED.decrypt(self._key, self._hint, torch.from_numpy(self._reply), self._parameters)


def run(quick: bool) -> str:
    """Return Markdown: the table, and the ratios with their targets. Raises InputError without the `bench` extra."""
    for package in ("concrete_ml_extensions", "tenseal"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f'{package} is not installed: pip install -e ".[bench]"')
    width, tokens = (256, 256) if quick else (WIDTH, TOKENS)
    linear = random_linear(width, width)
    public = public_matrix(choose_ring(tokens), width)
    x = random_rows(max(tokens, TensealTensor.degree // 2), width)
    sample_x, sample = x[:, :SAMPLE_IN].contiguous(), linear.weight[:SAMPLE_OUT, :SAMPLE_IN].contiguous()
    with stored_hint(public, linear) as hint, engine_of(linear, DEFAULT_ENGINE) as engine:
        concrete = ConcreteMl(x[:1], linear.weight)
        systems: list[System] = [
            Ours(x[:tokens], linear, public, hint, engine),
            TensealScalars(sample_x, sample),
            TensealTensor(sample_x, sample, torch.get_num_threads()),
            concrete,
        ]
        rows, ratios = measure(systems, width, repeats=1 if quick else 5)
    headings = ["", "server s/token", "CPU s", "ours is faster by", "client s/token", "bytes up/token", "down", "error"]
    prose = PROSE.format(
        width=width,
        tokens=tokens,
        engine=DEFAULT_ENGINE,
        sample_in=SAMPLE_IN,
        sample_out=SAMPLE_OUT,
        key=concrete.key_bytes / 1e6,
        hint=4e-6 * width * public.params.lattice_dim,
    )
    verdicts = [
        f"* {name}: {ratios[name]:,.0f} times; target {target:,}: {'reached' if ratios[name] >= target else 'MISSED'}."
        for name, target in TARGETS.items()
    ]
    return "\n\n".join([prose, table(headings, rows), "\n".join(verdicts)])


def measure(systems: list[System], width: int, repeats: int) -> tuple[list[list[object]], dict[str, float]]:
    """Measure all systems: rows, and by name how many times faster per token the first one's server is (median of pairs)."""
    for system in systems:
        system.encrypt()
    served = paired({system.name: system.serve for system in systems}, repeats, budget_seconds=600)
    clients: dict[str, Callable[[], object]] = {}
    for system in systems:
        clients |= {f"{system.name} encrypt": system.encrypt, f"{system.name} decrypt": system.decrypt}
    client = paired(clients, repeats, warmup=0 if repeats == 1 else 1)
    rows: list[list[object]] = []
    ratios: dict[str, float] = {}
    first = systems[0].name
    for system in systems:
        share_in, share_out = (computed / width for computed in system.features)
        work = system.tokens * share_in * share_out  # tokens of the whole linear that one call is worth
        samples = served[system.name]
        ratios[system.name] = ratio(
            [s / work for s in samples.wall], [s / systems[0].tokens for s in served[first].wall]
        )
        encrypt = client[f"{system.name} encrypt"].seconds / (system.tokens * share_in)
        decrypt = client[f"{system.name} decrypt"].seconds / (system.tokens * share_out)
        system.serve()  # with the ciphertexts of the last encryption
        error = relative_error(system.decrypt(), system.exact())
        up = system.bytes_up / (system.tokens * share_in)
        down = system.bytes_down / (system.tokens * share_out)
        faster = "" if system.name == first else f"{ratios[system.name]:,.0f} ×"
        cells = [samples.seconds / work, samples.cpu_seconds / work, faster, encrypt + decrypt]
        rows.append([system.name, *cells, f"{up:,.0f}", f"{down:,.0f}", error])
    return rows, ratios
