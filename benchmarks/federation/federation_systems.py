"""Time the cryptography of a round in two ways to add updates: this project's, and the published one of FedShield-LLM."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from hecompile.he.aggregation import scheme as aggregation
from hecompile.he.aggregation.parameters import AggregationParameters
from hecompile.he.aggregation.scheme import EncryptedSum, EncryptedVector
from hecompile.he.random.sampling import PublicSeed, SecretRandom
from hecompile.runtime.federation.protocol import shamir
from hecompile.runtime.federation.protocol.channels import Channels
from hecompile.runtime.federation.protocol.transcript import coordinates, decode, encode

POINTS, MODULUS_BITS, SCALE = 8192, (60, 40, 40, 60), 2.0**40
"""TenSEAL's parameters in the code of FedShield-LLM."""


@dataclass(frozen=True)
class Cost:
    """Hold the costs of one round.

    client, server, opening: seconds of one client until its bytes are ready, of the server, and of whoever opens the sum.
    largest_error, rms_error: of the mean, over the root mean square of an update.
    """

    client: float
    server: float
    opening: float
    bytes_up: int
    largest_error: float
    rms_error: float


def made_up_updates(clients: int, count: int) -> list[NDArray[np.float32]]:
    """Draw normal updates with standard deviation 0.02, about that of a round of the small Llama."""
    generator = np.random.default_rng(0)
    return [generator.normal(0, 0.02, count).astype(np.float32) for _ in range(clients)]


def _errors(mean: NDArray[np.float64], updates: list[NDArray[np.float32]]) -> tuple[float, float]:
    exact = np.mean([update.astype(np.float64) for update in updates], axis=0)
    scale = float(np.sqrt(np.mean(updates[0].astype(np.float64) ** 2)))
    return float(np.abs(mean - exact).max()) / scale, float(np.sqrt(np.mean((mean - exact) ** 2))) / scale


def ours(updates: list[NDArray[np.float32]], value_range: float) -> Cost:
    """Time all that a participant computes and sends (quantising, key, encryption, shares, sealing), and the sum."""
    clients, count = len(updates), len(updates[0])
    threshold, parameters = clients // 2 + 1, AggregationParameters(clients, value_range)
    seed, names = PublicSeed.draw(), [f"owner-{index}" for index in range(clients)]
    private = {name: X25519PrivateKey.generate() for name in names}
    publics = {name: key.public_key().public_bytes_raw() for name, key in private.items()}
    size, client_seconds, sent, shares = coordinates(count), [], [], []
    for name, update in zip(names, updates, strict=True):
        started = time.perf_counter()
        plaintext = encode(parameters, update.astype(np.float64), 1)
        key = aggregation.keygen(parameters)
        content = aggregation.encrypt(parameters, seed, key, plaintext).to_bytes()
        rows = shamir.share(key.spend("share").reshape(-1), threshold, clients, SecretRandom())
        channels = Channels(name, private[name], publics, bytes(32))
        sealed = [channels.seal(other, row.tobytes()) for other, row in zip(names, rows, strict=True)]
        client_seconds.append(time.perf_counter() - started)
        sent.append((content, sum(map(len, sealed))))
        shares.append(rows)
    started = time.perf_counter()
    total = EncryptedSum(parameters, size)
    for content, _ in sent:
        total.add(EncryptedVector.from_bytes(parameters, content, size))
    server = time.perf_counter() - started
    started = time.perf_counter()
    sums = {point + 1: shamir.add([rows[point] for rows in shares]) for point in range(clients)}
    key_sum = shamir.combine(sums, threshold).reshape(parameters.ring.rank, parameters.ring.ring_dim)
    values, _ = decode(parameters, total.open(seed, key_sum), clients)
    opening = time.perf_counter() - started
    errors = _errors(values / clients, updates)
    return Cost(statistics.median(client_seconds), server, opening, len(sent[0][0]) + sent[0][1], *errors)


def tenseal_ckks(updates: list[NDArray[np.float32]]) -> Cost:
    """Time the published way: one key of all clients, CKKS vectors of the update, summed and scaled by the server."""
    import tenseal

    context: Any = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, POINTS, coeff_mod_bit_sizes=list(MODULUS_BITS), n_threads=1
    )
    context.global_scale = SCALE
    slots, client_seconds, sent = POINTS // 2, [], []
    for update in updates:
        started = time.perf_counter()
        pieces = [tenseal.ckks_vector(context, update[at : at + slots].tolist()) for at in range(0, len(update), slots)]
        sent.append([piece.serialize() for piece in pieces])
        client_seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    totals = [tenseal.ckks_vector_from(context, content) for content in sent[0]]
    for contents in sent[1:]:
        for total, content in zip(totals, contents, strict=True):
            total += tenseal.ckks_vector_from(context, content)
    totals = [total * (1 / len(updates)) for total in totals]
    server = time.perf_counter() - started
    started = time.perf_counter()
    mean = np.concatenate([np.array(total.decrypt()) for total in totals])
    opening = time.perf_counter() - started
    errors = _errors(mean, updates)
    return Cost(statistics.median(client_seconds), server, opening, sum(map(len, sent[0])), *errors)
