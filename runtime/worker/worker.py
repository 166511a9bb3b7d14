"""Answer requests with public circuits and an engine. `handle` decides every answer; servers only move frames."""

from __future__ import annotations

import logging
import time

import numpy as np

from hecompile.bundles.public_rows import exact_name
from hecompile.bundles.worker import WorkerBundle
from hecompile.errors import HecompileError, WorkerError
from hecompile.runtime.wire import protocol
from hecompile.runtime.wire.framing import Frame
from hecompile.runtime.wire.protocol import (
    ErrorReply,
    EvaluateReply,
    EvaluateRequest,
    HelloRequest,
    HintRequest,
    Reply,
    Request,
    WorkerInfo,
)
from hecompile.runtime.worker.engines import DEFAULT_ENGINE, create_engine
from hecompile.runtime.worker.engines.base import Engine

LOGGER = logging.getLogger(__name__)


class Worker:
    """Hold a bundle and the engine that evaluates it: immutable once made, no state between requests.

    Args:
        bundle: the circuits.
        engine: a name of `hecompile.runtime.worker.engines.ENGINES`, or an engine made already.
    """

    def __init__(self, bundle: WorkerBundle, engine: str | Engine = DEFAULT_ENGINE) -> None:
        self.bundle = bundle
        self.engine: Engine = create_engine(engine, bundle) if isinstance(engine, str) else engine
        self._public_rows = bundle.public_rows() if bundle.has_public_rows else None

    def setup_product(self, circuit: str) -> tuple[str, np.ndarray]:
        """Return the product that is the hint of `circuit`: its exact form's name, and the public rows for its inputs.

        Raises WorkerError when the bundle cannot make hints, or has no such circuit.
        """
        name = exact_name(circuit)
        spec = self.bundle.circuits.get(name)
        if self._public_rows is None or spec is None:
            raise WorkerError(
                f"the worker bundle cannot compute the hint of {circuit!r}: only one that was exported with --no-hints can"
            )
        return name, np.ascontiguousarray(self._public_rows[:, :, : spec.in_features])

    def exchange(self, frame: Frame) -> Frame:
        """Answer one frame with one frame; every failure becomes an error frame."""
        request_id = 0
        try:
            request_id, request = protocol.decode_request(frame)
            return protocol.encode(handle(request, self), request_id)
        except HecompileError as error:
            LOGGER.info("refused a request: %s", error)  # where client and worker are one process, the client says it
            return protocol.encode(ErrorReply(str(error)), request_id)
        except Exception as error:
            # Neither the text nor the traceback is sent: they may quote values of the payload.
            LOGGER.error("a request failed with %s", type(error).__name__)
            return protocol.encode(ErrorReply(f"the worker failed with {type(error).__name__}"), request_id)


def handle(request: Request, state: Worker) -> Reply:
    """Answer one request; depends on nothing but its arguments. Raises WorkerError to refuse."""
    bundle = state.bundle
    if isinstance(request, HelloRequest):
        if request.protocol != protocol.PROTOCOL_VERSION:
            raise WorkerError(
                f"the client speaks protocol {request.protocol}, this worker {protocol.PROTOCOL_VERSION}; "
                "install the same version of hecompile on both"
            )
        if request.plan_id != bundle.plan_id:
            raise WorkerError(
                f"worker bundle is of another plan: expected {request.plan_id}, got {bundle.plan_id}; "
                "start the worker on the bundle that was compiled together with the client's"
            )
        circuits = {
            name: protocol.CircuitInfo(spec.upload_bits, spec.in_features, spec.reply_bits, spec.out_features)
            for name, spec in bundle.circuits.items()
        }
        return WorkerInfo(bundle.plan_id, state.engine.name, circuits)
    if isinstance(request, HintRequest):
        return EvaluateReply(bundle.hint_file(request.circuit)[None, None], 0.0)  # [1, 1, bytes], sent from the mapped file
    circuit, planes = (
        (request.circuit, request.planes) if isinstance(request, EvaluateRequest) else state.setup_product(request.circuit)
    )
    spec = bundle.circuits.get(circuit)
    if isinstance(request, EvaluateRequest) and spec is not None and request.bits not in (None, spec.upload_bits):
        raise WorkerError(f"circuit {circuit}: its words have {spec.upload_bits} bits, those of the request {request.bits}")
    tokens = planes.shape[1]
    start = time.perf_counter()
    planes = state.engine.evaluate(circuit, planes)
    seconds = time.perf_counter() - start
    LOGGER.debug("evaluated %s for %d tokens in %.4f s", circuit, tokens, seconds)
    return EvaluateReply(planes, seconds, None if spec is None else spec.reply_bits)
