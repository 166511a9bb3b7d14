"""Measure the client's cryptography: nanoseconds per element and core to encrypt and to decrypt, everything included."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch

from benchmarks.crypto.client_path import PATHS, REFERENCE, TRAINED, ClientPath
from benchmarks.report import section_main, table
from benchmarks.timing import Samples, paired, thread_counts, threads
from benchmarks.worker.linears import Linear, public_matrix, random_linear, random_rows, relative_error, stored_hint
from hecompile.he.kernels.transform import transform_secrets
from hecompile.he.parameters import CATALOGUE, RingParameters
from hecompile.he.random.sampling import SecretRandom
from hecompile.he.scheme import blocks, evaluate, keygen
from hecompile.passes.offload.select_parameters import choose_ring

TARGET_NS = 3.0
SHAPES = ((2048, 2048), (2048, 8192), (8192, 2048))
TOKENS = (512, 1024, 2048)
RING_SHAPE, RING_TOKENS = (2048, 2048), 1024
PROSE = f"""\
## Client cryptography

Time of encrypting (scaling, rounding, drawing the secret, product with the public matrix, error, packing to wire bytes) and
of decrypting (unpacking, product of hint and secret, centring, scaling back), over the elements (tokens × features) of the
side that is encrypted or decrypted, times the threads used; `CPU`: the CPU time of all threads instead, in which those that
wait for others have no part. `trained` is what training calls. Error: relative rms error of the decrypted product to the
exact one. Target: at most {TARGET_NS:g} ns per element and core.
"""


def run(quick: bool) -> str:
    """Return Markdown: by shape and tokens with the ring that the compiler would choose, by ring, and the parts' split."""
    shapes, tokens = (((64, 96),), (40,)) if quick else (SHAPES, TOKENS)
    ring_shape, ring_tokens = ((64, 64), 48) if quick else (RING_SHAPE, RING_TOKENS)
    repeats = 2 if quick else 9
    by_shape: list[list[object]] = []
    for in_features, out_features in shapes:
        linear = random_linear(in_features, out_features)
        for count in tokens:
            by_shape += _rows(linear, choose_ring(count), count, repeats)
    by_ring: list[list[object]] = []
    linear = random_linear(*ring_shape)
    for ring in CATALOGUE.values():
        by_ring += _rows(linear, ring, ring_tokens, repeats, {"trained": TRAINED})
    headings = ["in × out", "tokens", "ring × rank", "path", "threads", "encrypt ns/element/core", "decrypt"]
    headings += ["encrypt, CPU ns/element", "decrypt, CPU", "error"]
    return "\n\n".join(
        [
            PROSE,
            table(headings, by_shape),
            f"Every ring that can be selected, at {ring_shape[0]} × {ring_shape[1]} and {ring_tokens} tokens:",
            table(headings, by_ring),
            "Parts of encrypting that exist as functions of their own, one thread:",
            table(["in", "tokens", "part", "ns/element"], _split(ring_shape[0], ring_tokens, repeats)),
        ]
    )


def _rows(
    linear: Linear, ring: RingParameters, tokens: int, repeats: int, paths: dict[str, ClientPath] = PATHS
) -> list[list[object]]:
    parameters = linear.parameters
    public = public_matrix(ring, parameters.in_features)
    x = random_rows(tokens, parameters.in_features)
    exact = x.double() @ linear.weight.double().t()
    rows: list[list[object]] = []
    with ExitStack() as stack:
        results = {}
        for name, path in paths.items():
            hint = stack.enter_context(stored_hint(public, linear, words=path is REFERENCE))
            ciphertext, key = path.encrypt(public, x, parameters)
            reply = evaluate(linear.weight, ciphertext.planes, parameters)
            error = relative_error(path.decrypt(key, hint, reply, parameters), exact)
            results[name] = (path, key, hint, reply, error)
        for count in thread_counts():
            calls: dict[str, Callable[[], object]] = {}
            for name, (path, key, hint, reply, _) in results.items():
                calls[f"{name} encrypt"] = partial(path.encrypt, public, x, parameters)
                calls[f"{name} decrypt"] = partial(path.decrypt, key, hint, reply, parameters)
            with threads(count):
                samples = paired(calls, repeats)
            for name, (*_, error) in results.items():
                sides = (
                    (samples[f"{name} encrypt"], tokens * parameters.in_features),
                    (samples[f"{name} decrypt"], tokens * parameters.out_features),
                )
                wall = [_nanoseconds(taken, elements, count) for taken, elements in sides]
                cpu = [1e9 * taken.cpu_seconds / elements for taken, elements in sides]
                shape = f"{parameters.in_features} × {parameters.out_features}"
                rows.append([shape, tokens, f"{ring.ring_dim} × {ring.rank}", name, count, *wall, *cpu, error])
    return rows


def _nanoseconds(samples: Samples, elements: int, cores: int) -> float:
    return 1e9 * samples.seconds * cores / elements


def _split(features: int, tokens: int, repeats: int) -> list[list[object]]:
    parameters = random_linear(features, features).parameters
    x = random_rows(tokens, features)
    public = public_matrix(choose_ring(tokens), features)
    ring = public.params
    count = len(blocks(tokens, ring.ring_dim))
    calls: dict[str, Callable[[], object]] = {
        "error sampling": lambda: SecretRandom().discrete_gaussian((tokens, features)),
        "drawing and transforming the secrets": lambda: transform_secrets(
            np.stack([keygen(ring).spend() for _ in range(count)]), ring
        ),
        "all of encrypting": lambda: TRAINED.encrypt(public, x, parameters),
    }
    with threads(1):
        samples = paired(calls, repeats)
    return [[features, tokens, name, _nanoseconds(samples[name], tokens * features, 1)] for name in calls]


if __name__ == "__main__":
    torch.manual_seed(0)
    section_main("crypto")
