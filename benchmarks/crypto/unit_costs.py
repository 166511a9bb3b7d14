"""Fit the unit costs of `hecompile.plan.costs.CostModel` to this machine, and show how well the model then predicts.

    python -m benchmarks unit_costs [--quick]

Seconds of encrypting and decrypting are taken for several rings and numbers of tokens, the shortest of a few repetitions
each (the model is of an undisturbed machine). transform_flops, encrypt_seconds, decrypt_seconds and hint_bandwidth are
fitted to them by least squares of the relative error. Products are timed on a 2048 x 2048 matrix.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from benchmarks.report import table
from hecompile.he.fused import decrypt_reals, encrypt_reals
from hecompile.he.hints import Hint
from hecompile.he.parameters import CATALOGUE, LinearParameters, RingParameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import PublicSeed
from hecompile.inspection.prediction import LIKELY_HINT_BITS
from hecompile.plan.costs import CostModel, hint_bytes

FEATURES = 1024
POINTS = (
    ("128x12", 128), ("256x6", 256), ("256x6", 1024), ("512x3", 512), ("512x3", 2048), ("1024x2", 1024), ("2048x1", 2048),
)  # fmt: skip
QUICK_POINTS = (("256x6", 256), ("512x3", 512), ("2048x1", 2048))
REPEATS, QUICK_REPEATS = 9, 2


def run(quick: bool) -> str:
    """Return Markdown: the fitted unit costs beside the defaults, and measured against predicted seconds."""
    points, repeats = (QUICK_POINTS, QUICK_REPEATS) if quick else (POINTS, REPEATS)
    measured = [_point(CATALOGUE[name], tokens, repeats) for name, tokens in points]
    costs, rows = fit(
        [(CATALOGUE[name], tokens, *times) for (name, tokens), times in zip(points, measured, strict=True)]
    )
    default = CostModel()
    fitted: list[list[object]] = [
        ["ring products, flops/s", f"{costs.transform_flops:.3g}", f"{default.transform_flops:.3g}"],
        ["encrypting an element beside, ns", *(f"{1e9 * one.encrypt_seconds:.2f}" for one in (costs, default))],
        ["decrypting an element beside, ns", *(f"{1e9 * one.decrypt_seconds:.2f}" for one in (costs, default))],
        ["reading hints and A, bytes/s", f"{costs.hint_bandwidth:.3g}", f"{default.hint_bandwidth:.3g}"],
        ["float32 products, flops/s", f"{_float_speed(repeats):.3g}", f"{default.client_flops:.3g}"],
        ["int8 products, operations/s", f"{_int8_speed(repeats):.3g}", f"{default.worker_flops:.3g}"],
    ]
    return "\n\n".join(
        [
            "## Unit costs of the cost model",
            "Fitted to this machine, beside the defaults that parameter selection uses (only their ratios matter).",
            table(["", "fitted", "default"], fitted),
            f"ns per element of {FEATURES} features, measured and by the fitted model:",
            table(["ring", "tokens", "encrypt", "model", "decrypt", "model"], rows),
        ]
    )


def fit(points: list[tuple[RingParameters, int, float, float]]) -> tuple[CostModel, list[list[object]]]:
    """Return the cost model that fits (ring, tokens, seconds to encrypt, to decrypt) best, and a table row per point."""
    unit = CostModel(transform_flops=1.0, encrypt_seconds=0.0, decrypt_seconds=0.0, hint_bandwidth=float("inf"))
    matrix, seconds = [], []
    for ring, tokens, encrypting, decrypting in points:
        elements, read = FEATURES * tokens, float(hint_bytes(ring, FEATURES))
        matrix.append([unit.encrypt(ring, tokens, FEATURES), elements, 0.0, 2 * read])
        matrix.append([unit.decrypt(ring, tokens, FEATURES), 0.0, elements, read])
        seconds += [encrypting, decrypting]
    weights = 1 / np.array(seconds)
    solution, *_ = np.linalg.lstsq(np.array(matrix) * weights[:, None], np.ones(len(seconds)), rcond=None)
    costs = replace(
        unit,
        transform_flops=1 / solution[0],
        encrypt_seconds=float(solution[1]),
        decrypt_seconds=float(solution[2]),
        hint_bandwidth=float(1 / solution[3]) if solution[3] > 0 else float("inf"),
    )
    rows: list[list[object]] = []
    for ring, tokens, encrypting, decrypting in points:
        scale = 1e9 / (FEATURES * tokens)
        cells = [encrypting, costs.encrypt(ring, tokens, FEATURES), decrypting, costs.decrypt(ring, tokens, FEATURES)]
        rows.append([f"{ring.ring_dim}x{ring.rank}", tokens, *(f"{scale * cell:.2f}" for cell in cells)])
    return costs, rows


def _point(ring: RingParameters, tokens: int, repeats: int) -> tuple[float, float]:
    """Measure the seconds to encrypt and to decrypt [tokens, FEATURES]."""
    linear = LinearParameters(FEATURES, FEATURES, max_l1=2**15, max_l2=2.0**10, upload_bits=24, reply_bits=16)
    public = PublicMatrix(ring, PublicSeed.from_hex("33" * 32), FEATURES)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, FEATURES, generator=generator)
    words = torch.randint(-(2**31), 2**31, (FEATURES, ring.lattice_dim), generator=generator).to(torch.int32)
    hint = Hint.from_coefficients(ring, words, bits=LIKELY_HINT_BITS)
    reply = torch.randint(0, 256, (2, tokens, FEATURES), generator=generator, dtype=torch.uint8)
    _, key = encrypt_reals(public, x, linear)
    encrypting = _shortest(lambda: encrypt_reals(public, x, linear), repeats)
    return encrypting, _shortest(lambda: decrypt_reals(key, hint, reply, linear), repeats)


def _float_speed(repeats: int) -> float:
    a, b = torch.randn(1024, 2048), torch.randn(2048, 2048)
    return 2 * 1024 * 2048**2 / _shortest(lambda: a @ b, repeats)


def _int8_speed(repeats: int) -> float:
    a, b = (torch.randint(-127, 127, shape, dtype=torch.int8) for shape in ((3072, 2048), (2048, 2048)))
    return 2 * 3072 * 2048**2 / _shortest(lambda: torch._int_mm(a, b), repeats)


def _shortest(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
