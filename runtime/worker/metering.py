"""Report to the worker's operator: Prometheus metrics and structured logs, with nothing of the contents of requests.

    hecompile_requests_total{outcome}       products, by outcome: computed, refused or failed
    hecompile_tokens_total                  rows in them
    hecompile_bytes_total{direction}        byte planes in and out
    hecompile_compute_seconds               histogram of the engine's time
    hecompile_requests_in_flight            requests under way

Circuits are not labels: their names tell a layer, and a metric per circuit would let readers of the metrics follow a
client's step.
"""

from __future__ import annotations

import datetime
import json
import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from hecompile.errors import HecompileError, InputError
from hecompile.extras import install_command
from hecompile.runtime.worker.engines.base import Engine

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class MeteredEngine:
    """Count the requests of an engine. Raises InputError when prometheus_client is not installed."""

    def __init__(self, engine: Engine, registry: CollectorRegistry | None = None) -> None:
        try:
            import prometheus_client
        except ImportError:
            raise InputError(f"metrics need prometheus_client: {install_command('network')}") from None
        self.name = engine.name
        self.registry = registry or prometheus_client.CollectorRegistry()
        self._engine = engine
        where: dict[str, Any] = {"registry": self.registry}
        self._requests = prometheus_client.Counter("hecompile_requests", "Products", ["outcome"], **where)
        self._tokens = prometheus_client.Counter("hecompile_tokens", "Rows of products", **where)
        self._bytes = prometheus_client.Counter("hecompile_bytes", "Byte planes", ["direction"], **where)
        self._seconds = prometheus_client.Histogram(
            "hecompile_compute_seconds", "The engine's time", buckets=_BUCKETS, **where
        )
        self._in_flight = prometheus_client.Gauge("hecompile_requests_in_flight", "Under way", **where)

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        """See `Engine.evaluate`."""
        start = time.perf_counter()
        try:
            with self._in_flight.track_inprogress():
                reply = self._engine.evaluate(circuit, planes)
        except HecompileError:
            self._requests.labels("refused").inc()
            raise
        except Exception:
            self._requests.labels("failed").inc()
            raise
        self._seconds.observe(time.perf_counter() - start)
        self._requests.labels("computed").inc()
        self._tokens.inc(planes.shape[1])
        self._bytes.labels("in").inc(planes.nbytes)
        self._bytes.labels("out").inc(reply.nbytes)
        return reply

    def serve(self, address: str) -> tuple[str, int]:
        """Answer GET /metrics at host:port (port 0: any free one) in a thread; returns host and port. Raises InputError."""
        import prometheus_client

        host, _, port = address.rpartition(":")
        try:
            server, _ = prometheus_client.start_http_server(int(port), host.strip("[]") or "127.0.0.1", self.registry)
        except (OSError, ValueError, OverflowError) as error:
            raise InputError(f"metrics cannot be served at {address}: {error}; give HOST:PORT") from None
        return server.server_address[0], server.server_port  # type: ignore[return-value]


class JsonFormatter(logging.Formatter):
    """Format a record as a line of JSON: time (UTC, ISO 8601), level, logger, message, and the type of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[0] is not None:
            entry["exception"] = record.exc_info[0].__name__
        return json.dumps(entry)
