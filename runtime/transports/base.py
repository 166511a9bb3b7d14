"""Define the protocol of transports, and do what all of them share: frames, the checks of a reply, the counters."""

from __future__ import annotations

import abc
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from hecompile.bundles.public_rows import exact_name
from hecompile.errors import WorkerError
from hecompile.runtime.wire import protocol
from hecompile.runtime.wire.framing import Frame
from hecompile.runtime.wire.protocol import (
    CircuitInfo,
    ErrorReply,
    EvaluateReply,
    EvaluateRequest,
    HelloRequest,
    HintRequest,
    Reply,
    Request,
    SetupRequest,
    WorkerInfo,
)

Direction = Literal["sent", "received"]
TrafficRecorder = Callable[[Direction, bytes], None]
"""Takes every whole frame that passes, as the client sees it; for tests of what an eavesdropper sees."""


@dataclass(frozen=True)
class Answer:
    """Hold the reply to one request, and its costs.

    Attributes:
        planes: uint8 [reply_bytes, T, out], of the shape that the worker announced.
        worker_seconds: the engine's time as the worker gives it; the rest of the waiting time is the wire, and the worker's
            other requests.
        bytes_sent, bytes_received: whole frames of this request.
        worker: which of several workers answered; "" where there is but one.
    """

    planes: np.ndarray
    worker_seconds: float
    bytes_sent: int
    bytes_received: int
    worker: str = ""


class Transport(Protocol):
    """Carry requests to a worker and replies back.

    Several threads may call `evaluate` at once where `concurrent` is true; one thread calls hello before and close after.

    A request names its circuit and carries its ciphertext, and the worker keeps no state between requests. A transport may
    therefore send it again, also to another worker of the same plan. It sends the same ciphertext; the caller decides
    whether to encrypt anew.
    """

    @property
    def concurrent(self) -> bool:
        """Tell whether several threads may call `evaluate` at once."""
        ...

    def hello(self, plan_id: str) -> WorkerInfo:
        """Introduce the client. Raises WorkerError when the worker serves another plan or another protocol."""
        ...

    def evaluate(self, circuit: str, planes: np.ndarray) -> Answer:
        """Multiply `planes`, uint8 [upload_limbs, T, in], by the weight of a circuit on the worker.

        Raises:
            WorkerError: the worker refuses or breaks the protocol.
            WorkerUnavailableError: it is gone or takes too long.
        """
        ...

    def setup(self, circuit: str, lattice_dim: int) -> Answer:
        """Compute the hint of a circuit on a worker whose bundle holds the public rows: planes uint8 [4, lattice_dim, out].

        Raises WorkerError as `evaluate` does.
        """
        ...

    def hint(self, circuit: str, size: int) -> Answer:
        """Fetch the hint of a circuit, a file of `size` bytes, from a worker whose bundle has it: planes uint8 [1, 1, size].

        Raises WorkerError as `evaluate` does.
        """
        ...

    def close(self) -> None:
        """End the connection; every later call raises WorkerError."""
        ...


class FrameTransport(abc.ABC):
    """Make a transport of anything that exchanges one frame for one. As concurrent as its `_exchange`.

    Attributes:
        bytes_sent, bytes_received: whole frames so far, hello and known answers included.
    """

    concurrent = False

    def __init__(self, recorder: TrafficRecorder | None = None) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._recorder = recorder
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._info: WorkerInfo | None = None

    @abc.abstractmethod
    def _exchange(self, frame: Frame) -> Frame:
        """Deliver one frame and wait for the answer. Raises WorkerError."""

    @abc.abstractmethod
    def close(self) -> None:
        """See `Transport.close`."""

    def hello(self, plan_id: str) -> WorkerInfo:
        """See `Transport.hello`."""
        reply, _, _ = self._request(HelloRequest(plan_id))
        if not isinstance(reply, WorkerInfo):
            raise WorkerError(f"the worker answered hello with {type(reply).__name__}")
        if reply.protocol != protocol.PROTOCOL_VERSION:
            raise WorkerError(
                f"the worker speaks protocol {reply.protocol}, this client {protocol.PROTOCOL_VERSION}; "
                "install the same version of hecompile on both"
            )
        if reply.plan_id != plan_id:
            raise WorkerError(f"the worker answers for plan {reply.plan_id}; needs plan {plan_id}")
        self._info = reply
        return reply

    def evaluate(self, circuit: str, planes: np.ndarray) -> Answer:
        """See `Transport.evaluate`; needs `hello` first."""
        request = EvaluateRequest(circuit, planes, self._announced(circuit).upload_bits)
        return self._product(circuit, request, planes.shape[1])

    def setup(self, circuit: str, lattice_dim: int) -> Answer:
        """See `Transport.setup`; needs `hello` first."""
        return self._product(exact_name(circuit), SetupRequest(circuit), lattice_dim)

    def hint(self, circuit: str, size: int) -> Answer:
        """See `Transport.hint`; needs `hello` first."""
        reply, sent, received = self._request(HintRequest(circuit))
        if not isinstance(reply, EvaluateReply) or reply.planes.shape != (1, 1, size):
            got = reply.planes.shape if isinstance(reply, EvaluateReply) else type(reply).__name__
            raise WorkerError(f"the hint of {circuit}: the worker answered with {got}; needs a file of {size} bytes")
        return Answer(reply.planes, reply.compute_seconds, sent, received)

    def _announced(self, circuit: str) -> CircuitInfo:
        """Return what the worker said of a circuit in its hello."""
        if self._info is None:
            raise WorkerError("a request before hello: open connections with open_connection")
        announced = self._info.circuits.get(circuit)
        if announced is None:
            raise WorkerError(f"the worker has no circuit {circuit!r}; start it on the bundle of this plan")
        return announced

    def _product(self, circuit: str, request: Request, tokens: int) -> Answer:
        """Send a request that `circuit` answers for `tokens` tokens, and check the shape of the reply."""
        announced = self._announced(circuit)
        reply, sent, received = self._request(request)
        if not isinstance(reply, EvaluateReply):
            raise WorkerError(f"the worker answered circuit {circuit} with {type(reply).__name__}")
        expected = (announced.reply_bytes, tokens, announced.out_features)
        if reply.planes.shape != expected or reply.bits != announced.reply_bits:
            raise WorkerError(
                f"circuit {circuit}: the reply has shape {reply.planes.shape} with {reply.bits} bits a word; "
                f"needs {expected} with {announced.reply_bits}"
            )
        return Answer(reply.planes, reply.compute_seconds, sent, received)

    def _request(self, request: Request) -> tuple[Reply, int, int]:
        """Send a request; returns (reply, bytes sent, bytes received)."""
        with self._lock:
            request_id = next(self._ids)
        frame = protocol.encode(request, request_id)
        self._record("sent", frame)
        answer = self._exchange(frame)
        self._record("received", answer)
        reply_id, reply = protocol.decode_reply(answer)
        if isinstance(reply, ErrorReply):
            raise WorkerError(f"the worker refused the request: {reply.message}")
        if reply_id != request_id:
            raise WorkerError(f"the worker answered request {reply_id} when asked request {request_id}")
        return reply, frame.size, answer.size

    def _record(self, direction: Direction, frame: Frame) -> None:
        with self._lock:
            if direction == "sent":
                self.bytes_sent += frame.size
            else:
                self.bytes_received += frame.size
            if self._recorder is not None:
                self._recorder(direction, frame.prefix() + frame.header + bytes(frame.joined()))
