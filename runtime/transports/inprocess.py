"""Reach an embedded worker: same frames, no socket and no copy of the payload."""

from __future__ import annotations

from collections.abc import Callable

from hecompile.errors import WorkerError
from hecompile.runtime.transports.base import FrameTransport, TrafficRecorder
from hecompile.runtime.wire.framing import Frame


class InProcessTransport(FrameTransport):
    """Call a worker of this process; its engine runs in the calling thread, and in several at once.

    Args:
        exchange: answers one frame with one frame: `Worker.exchange` of the worker.
    """

    concurrent = True

    def __init__(self, exchange: Callable[[Frame], Frame], recorder: TrafficRecorder | None = None) -> None:
        super().__init__(recorder)
        self._answer: Callable[[Frame], Frame] | None = exchange

    def _exchange(self, frame: Frame) -> Frame:
        answer = self._answer
        if answer is None:
            raise WorkerError("the connection to the embedded worker is closed")
        return answer(frame)

    def close(self) -> None:
        """See `Transport.close`."""
        self._answer = None
