"""The operator's view: counts that agree with what was asked, over HTTP, and logs that are JSON and hold no payload."""

from __future__ import annotations

import json
import logging
import sys
import urllib.request

import numpy as np
import pytest

from hecompile.errors import InputError, WorkerError
from hecompile.runtime.transports import InProcessTransport, open_connection
from hecompile.runtime.worker.metering import JsonFormatter, MeteredEngine
from hecompile.runtime.worker.worker import Worker
from tests.support.bundles import PLAN_ID, extreme_planes, extreme_weight, write_bundle

pytest.importorskip("prometheus_client")


def test_metrics_count_what_was_asked_and_name_no_circuit(tmp_path: pytest.TempPathFactory) -> None:
    bundle = write_bundle(tmp_path / "worker", {"linear": (extreme_weight(8, 6), 24, 16)})  # type: ignore[operator]
    metered = MeteredEngine(Worker(bundle).engine)
    transport = InProcessTransport(Worker(bundle, metered).exchange)
    open_connection(transport, PLAN_ID)
    host, port = metered.serve("127.0.0.1:0")
    before = scrape(host, port)
    for tokens in (1, 4):
        transport.evaluate("linear.forward", extreme_planes(3, tokens, 8))
    with pytest.raises(WorkerError):
        transport.evaluate("linear.forward", np.zeros((3, 2, 9), dtype=np.uint8))
    after = scrape(host, port)
    grown = {name: after[name] - before.get(name, 0.0) for name in after if "bucket" not in name}
    assert grown['hecompile_requests_total{outcome="computed"}'] == 2
    assert grown['hecompile_requests_total{outcome="refused"}'] == 1
    assert grown["hecompile_tokens_total"] == 5
    assert grown['hecompile_bytes_total{direction="in"}'] == 3 * 5 * 8
    assert grown['hecompile_bytes_total{direction="out"}'] == 2 * 5 * 6
    assert grown["hecompile_compute_seconds_count"] == 2 and after["hecompile_requests_in_flight"] == 0
    assert not any("linear" in name for name in after)


def scrape(host: str, port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line and line[0] != "#"}


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999999", "203.0.113.1:0"])
def test_an_address_that_cannot_be_served_is_named(tmp_path: pytest.TempPathFactory, address: str) -> None:
    bundle = write_bundle(tmp_path / "worker", {"linear": (extreme_weight(8, 6), 24, 16)})  # type: ignore[operator]
    with pytest.raises(InputError, match="metrics cannot be served"):
        MeteredEngine(Worker(bundle).engine).serve(address)


def test_logs_are_one_json_object_per_line() -> None:
    try:
        raise ValueError("secret text")
    except ValueError:
        name = "hecompile.runtime.worker.worker"
        record = logging.LogRecord(name, logging.WARNING, "f", 1, "refused %s\n", ("x",), sys.exc_info())
    line = JsonFormatter().format(record)
    entry = json.loads(line)
    assert "\n" not in line and "secret" not in line
    assert entry["level"] == "warning" and entry["message"] == "refused x\n" and entry["exception"] == "ValueError"
    assert entry["time"].endswith("+00:00")
