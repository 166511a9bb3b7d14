"""What a transport is, and what all of them share: messages to frames, the checks of a reply, the counters."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

from hecompile.errors import WorkerError
from hecompile.public_rows import exact_name
from runtime import protocol
from runtime.protocol import (
    ErrorReply,
    EvaluateReply,
    EvaluateRequest,
    Frame,
    HelloRequest,
    Reply,
    Request,
    SetupRequest,
    WorkerInfo,
)

Direction = Literal["sent", "received"]
TrafficRecorder = Callable[[Direction, bytes], None]
"""Called with every whole frame that passes, as the client sees it; for tests of what an eavesdropper sees."""


class Transport(Protocol):
    """A connection to one worker. Not for use from several threads at once.

    bytes_sent, bytes_received: whole frames so far. worker_seconds: what the worker says its engine took so far; the
    rest of the waiting time is the wire.
    """

    bytes_sent: int
    bytes_received: int
    worker_seconds: float

    def hello(self, plan_id: str) -> WorkerInfo:
        """Introduce the client. Raises WorkerError when the worker serves another plan or another protocol."""
        ...

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        """uint8 [upload_limbs, T, in] → uint8 [reply_bytes, T, out], of the shape that the worker announced.

        Raises WorkerError when the worker refuses, breaks the protocol, is gone or takes too long.
        """
        ...

    def setup(self, circuit: str, lattice_dim: int) -> np.ndarray:
        """The product of the circuit's weight and the public rows, uint8 [4, lattice_dim, out]: its hint, from a worker
        whose bundle holds them. Raises WorkerError as `evaluate` does."""
        ...

    def close(self) -> None:
        """End the connection; every later call raises WorkerError."""
        ...


class FrameTransport(abc.ABC):
    """A transport over anything that exchanges one frame for one."""

    def __init__(self, recorder: TrafficRecorder | None = None) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self.worker_seconds = 0.0
        self._recorder = recorder
        self._requests = 0
        self._info: WorkerInfo | None = None

    @abc.abstractmethod
    def _exchange(self, frame: Frame) -> Frame:
        """Deliver one frame and wait for the answer. Raises WorkerError."""

    @abc.abstractmethod
    def close(self) -> None:
        """See `Transport.close`."""

    def hello(self, plan_id: str) -> WorkerInfo:
        """See `Transport.hello`."""
        reply = self._request(HelloRequest(plan_id))
        if not isinstance(reply, WorkerInfo):
            raise WorkerError(f"the worker answered hello with {type(reply).__name__}")
        if reply.protocol != protocol.PROTOCOL_VERSION or reply.plan_id != plan_id:
            raise WorkerError(
                f"the worker answers for plan {reply.plan_id} in protocol {reply.protocol}; "
                f"needs plan {plan_id} in protocol {protocol.PROTOCOL_VERSION}"
            )
        self._info = reply
        return reply

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        """See `Transport.evaluate`; needs `hello` first."""
        return self._product(circuit, EvaluateRequest(circuit, planes), planes.shape[1])

    def setup(self, circuit: str, lattice_dim: int) -> np.ndarray:
        """See `Transport.setup`; needs `hello` first."""
        return self._product(exact_name(circuit), SetupRequest(circuit), lattice_dim)

    def _product(self, circuit: str, request: Request, tokens: int) -> np.ndarray:
        """The reply to a request that `circuit` answers, for `tokens` tokens."""
        if self._info is None:
            raise WorkerError(f"{type(request).__name__} before hello: open connections with open_connection")
        announced = self._info.circuits.get(circuit)
        if announced is None:
            raise WorkerError(f"the worker has no circuit {circuit!r}; start it on the bundle of this plan")
        reply = self._request(request)
        if not isinstance(reply, EvaluateReply):
            raise WorkerError(f"the worker answered circuit {circuit} with {type(reply).__name__}")
        expected = (announced.reply_bytes, tokens, announced.out_features)
        if reply.planes.shape != expected:
            raise WorkerError(f"circuit {circuit}: the reply has shape {reply.planes.shape}; needs {expected}")
        self.worker_seconds += reply.compute_seconds
        return reply.planes

    def _request(self, request: Request) -> Reply:
        self._requests += 1
        frame = protocol.encode(request, self._requests)
        self._record("sent", frame)
        answer = self._exchange(frame)
        self._record("received", answer)
        reply_id, reply = protocol.decode_reply(answer)
        if isinstance(reply, ErrorReply):
            raise WorkerError(f"the worker refused the request: {reply.message}")
        if reply_id != self._requests:
            raise WorkerError(f"the worker answered request {reply_id} when asked request {self._requests}")
        return reply

    def _record(self, direction: Direction, frame: Frame) -> None:
        if direction == "sent":
            self.bytes_sent += frame.size
        else:
            self.bytes_received += frame.size
        if self._recorder is not None:
            self._recorder(direction, frame.prefix() + frame.header + bytes(frame.payload))
