"""The embedded worker: same frames, no socket and no copy of the payload."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hecompile.errors import WorkerError
from hecompile.runtime.protocol import Frame
from hecompile.runtime.transports.base import FrameTransport, TrafficRecorder

if TYPE_CHECKING:  # hecompile.runtime.worker imports this package for its addresses
    from hecompile.runtime.worker import Worker


class InProcessTransport(FrameTransport):
    """A worker of this process; its engine runs in the calling thread, and in several at once."""

    concurrent = True

    def __init__(self, worker: Worker, recorder: TrafficRecorder | None = None) -> None:
        super().__init__(recorder)
        self._worker: Worker | None = worker

    def _exchange(self, frame: Frame) -> Frame:
        worker = self._worker
        if worker is None:
            raise WorkerError("the connection to the embedded worker is closed")
        return worker.exchange(frame)

    def close(self) -> None:
        """See `Transport.close`."""
        self._worker = None
