"""Measure a worker before training with it: protocol, exactness, link, and predicted seconds of a step.

Every request is one that training makes, on random bytes in place of ciphertexts, which look no different.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.known_answer import KNOWN_ANSWER, known_answer_vector
from hecompile.he.parameters import LinearParameters
from hecompile.inspection.linear import circuits_without_gradient
from hecompile.plan.costs import CostModel
from hecompile.runtime.transports import Answer, Transport, open_connection

ROUND_TRIPS, PRODUCTS = 15, 3
_Shape = tuple[int, int, int, int]
"""Limbs and features of an upload, bytes and features of a reply: products of one shape cost the same."""


@dataclass(frozen=True)
class Diagnosis:
    """Report on a worker. Times in seconds, speeds in bytes per second, per step of `tokens` tokens where it says so.

    Attributes:
        engine: the name of the worker's engine.
        protocol: the version of the protocol.
        round_trip: median of a request of one token.
        up, down: speed of the link; None where it was too fast beside the worker's own time to tell.
        tokens: how many tokens the step of the following figures has.
        worker_step: the worker's own time in a step.
        wire_step: the rest of the time between request and reply in a step.
        client_step: the client's cryptography in a step, by the cost model.
        bytes_step: bytes of a step, up and down together.
    """

    engine: str
    protocol: int
    round_trip: float
    up: float | None
    down: float | None
    tokens: int
    worker_step: float
    wire_step: float
    client_step: float
    bytes_step: int

    @property
    def step(self) -> float:
        """Predict the seconds of a step without the client's own model, one request after the other."""
        return self.worker_step + self.wire_step + self.client_step


@dataclass(frozen=True)
class _Sample:
    """Hold the cost of one product: bytes, the worker's own seconds, and the rest of the seconds until the reply."""

    bytes_up: int
    bytes_down: int
    worker: float
    rest: float


def diagnose(
    bundle: ClientBundle, transport: Transport, tokens: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Diagnosis:
    """Request from the worker behind `transport` (not opened yet) one product of each shape that a step of the plan has.

    `tokens` is the number of tokens of a step; `progress` gets how many shapes are done and how many there are.

    Raises:
        WorkerError: the worker serves another plan, computes wrongly or does not answer.
    """
    info = open_connection(transport, bundle.plan_id)
    round_trip = _round_trip(transport, bundle.plan_id)
    skipped = circuits_without_gradient(bundle.graph())
    used = {name: parameters for name, parameters in bundle.circuits.items() if name not in skipped}
    one_of_each = {_shape(parameters): name for name, parameters in used.items()}
    samples: dict[_Shape, _Sample] = {}
    for done, (shape, name) in enumerate(one_of_each.items()):
        progress(done, len(one_of_each))
        samples[shape] = _sample(transport, name, used[name], tokens)
    progress(len(one_of_each), len(one_of_each))
    step = [samples[_shape(parameters)] for parameters in used.values()]
    up, down = _speeds(list(samples.values()), round_trip)
    costs = CostModel()
    client = sum(
        costs.encrypt(bundle.ring, tokens, p.in_features) + costs.decrypt(bundle.ring, tokens, p.out_features)
        for p in used.values()
    )
    return Diagnosis(
        engine=info.engine,
        protocol=info.protocol,
        round_trip=round_trip,
        up=up,
        down=down,
        tokens=tokens,
        worker_step=sum(sample.worker for sample in step),
        wire_step=sum(sample.rest for sample in step),
        client_step=client,
        bytes_step=sum(sample.bytes_up + sample.bytes_down for sample in step),
    )


def _shape(parameters: LinearParameters) -> _Shape:
    return parameters.upload_limbs, parameters.in_features, parameters.reply_bytes, parameters.out_features


def _round_trip(transport: Transport, plan_id: str) -> float:
    planes, _ = known_answer_vector(plan_id)
    return statistics.median(
        _timed(lambda: transport.evaluate(KNOWN_ANSWER, planes[:, :1]))[0] for _ in range(ROUND_TRIPS)
    )


def _sample(transport: Transport, circuit: str, parameters: LinearParameters, tokens: int) -> _Sample:
    """Time PRODUCTS products of random bytes."""
    size = (parameters.upload_limbs, tokens, parameters.in_features)
    words = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    taken = [_timed(lambda: transport.evaluate(circuit, words)) for _ in range(PRODUCTS)]
    fastest = min(taken, key=lambda pair: pair[0])[1]
    worker = statistics.median(answer.worker_seconds for _, answer in taken)
    rest = statistics.median(max(0.0, seconds - answer.worker_seconds) for seconds, answer in taken)
    return _Sample(fastest.bytes_sent, fastest.bytes_received, worker, rest)


def _timed(work: Callable[[], Answer]) -> tuple[float, Answer]:
    start = time.perf_counter()
    answer = work()
    return time.perf_counter() - start, answer


def _speeds(samples: list[_Sample], round_trip: float) -> tuple[float | None, float | None]:
    """Fit seconds = bytes_up / up + bytes_down / down beyond a round trip, by least squares over the shapes: (up, down)."""
    matrix = np.array([[sample.bytes_up, sample.bytes_down] for sample in samples], dtype=np.float64)
    seconds = np.array([max(0.0, sample.rest - round_trip) for sample in samples])
    if len(samples) < 2 or np.linalg.matrix_rank(matrix) < 2:
        total = matrix.sum()
        speed = total / seconds.sum() if seconds.sum() > 0 else None
        return speed, speed
    (per_up, per_down), *_ = np.linalg.lstsq(matrix, seconds, rcond=None)
    return (1 / per_up if per_up > 0 else None), (1 / per_down if per_down > 0 else None)
