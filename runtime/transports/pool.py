"""Keep several requests in flight by a pool of connections, each of which carries one at a time.

The worker serves each connection in a thread of its own: it reads one request while it computes another and answers a third.
Frames, and their order on a connection, are as without a pool. A transport that carries several requests on one connection
(`Transport.concurrent`) needs none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from hecompile.errors import WorkerError
from hecompile.runtime.transports.base import Answer, Transport
from hecompile.runtime.transports.open_connection import open_connection
from hecompile.runtime.wire.protocol import WorkerInfo


class TransportPool:
    """Share up to `size` connections to one worker, opened as they are needed; one that fails is closed and replaced.

    Args:
        connect: opens a connection; each says hello and passes the known-answer test before it is used.
        size: connections at most.
    """

    concurrent = True

    def __init__(self, connect: Callable[[], Transport], size: int) -> None:
        self._connect = connect
        self._turns = threading.Semaphore(size)
        self._idle: list[Transport] = []
        self._lock = threading.Lock()
        self._plan_id: str | None = None
        self._closed = False

    def hello(self, plan_id: str) -> WorkerInfo:
        """Open the first connection, which `open_connection` goes on to test; see `Transport.hello`."""
        self._refuse_if_closed()
        connection = self._connect()
        try:
            info = connection.hello(plan_id)
        except WorkerError:
            connection.close()
            raise
        self._plan_id = plan_id
        self._give_back(connection)
        return info

    def evaluate(self, circuit: str, planes: np.ndarray) -> Answer:
        """See `Transport.evaluate`; waits while `size` requests are in flight."""
        return self._over_a_connection(lambda connection: connection.evaluate(circuit, planes))

    def setup(self, circuit: str, lattice_dim: int) -> Answer:
        """See `Transport.setup`; waits as well."""
        return self._over_a_connection(lambda connection: connection.setup(circuit, lattice_dim))

    def hint(self, circuit: str, size: int) -> Answer:
        """See `Transport.hint`; waits as well."""
        return self._over_a_connection(lambda connection: connection.hint(circuit, size))

    def _over_a_connection(self, ask: Callable[[Transport], Answer]) -> Answer:
        if self._plan_id is None:
            raise WorkerError("evaluate was called before hello: open connections with open_connection")
        with self._turns:
            connection = self._take(self._plan_id)
            try:
                answer = ask(connection)
            except BaseException:
                connection.close()  # whatever went wrong: the next request must not find what this one left unread
                raise
            self._give_back(connection)
            return answer

    def close(self) -> None:
        """See `Transport.close`; a connection in use is closed when its request is through."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self, plan_id: str) -> Transport:
        with self._lock:
            if self._idle and not self._closed:
                return self._idle.pop()
        self._refuse_if_closed()
        connection = self._connect()
        open_connection(connection, plan_id)  # closes it when it refuses
        return connection

    def _give_back(self, connection: Transport) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise WorkerError("the connections to the worker are closed; connect again")
