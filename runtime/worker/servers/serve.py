"""Serve a worker until it is told to stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable

from hecompile.runtime.wire import framing
from hecompile.runtime.wire.credentials import ServerCredentials
from hecompile.runtime.worker.servers.open_server import open_server
from hecompile.runtime.worker.worker import Worker

LOGGER = logging.getLogger(__name__)


def serve(
    worker: Worker,
    address: str,
    *,
    ready: Callable[[str], None] = lambda address: None,
    stop: threading.Event | None = None,
    credentials: ServerCredentials | None = None,
    allow_plaintext_network: bool = False,
    max_message_bytes: int = framing.MAX_MESSAGE_BYTES,
) -> None:
    """Serve until SIGINT, SIGTERM (both only when called in the main thread) or `stop`.

    `ready` is called once with the address that clients connect to. Raises InputError as `open_server`.
    """
    stopped = stop or threading.Event()
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, lambda *_: stopped.set())
    try:
        with open_server(
            worker,
            address,
            credentials=credentials,
            allow_plaintext_network=allow_plaintext_network,
            max_message_bytes=max_message_bytes,
        ) as server:
            LOGGER.info("worker with engine %s listens on %s", worker.engine.name, server.address)
            ready(server.address)
            stopped.wait()
            LOGGER.info("worker on %s stops", server.address)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
