"""Soak a worker process: clients with connections of their own, for a while; nothing is lost, nothing mixed up.

$HECOMPILE_BENCHMARK_SOAK sets the seconds per transport (60).
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.report import table
from benchmarks.timing import resident_bytes
from benchmarks.worker.linears import PLAN_ID, write_random_bundle
from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.worker import WorkerBundle
from hecompile.runtime.transports import connect, open_connection
from hecompile.runtime.worker.process import running_worker

CLIENTS, SECONDS, QUICK_SECONDS = 8, 60.0, 2.0
IN, OUT, TOKENS = 256, 512, 64
ADDRESSES = {
    "frames, TCP": "tcp://127.0.0.1:0",
    "Arrow Flight": "flight://127.0.0.1:0",
    "Open Inference Protocol": "grpc://127.0.0.1:0",
}
PROSE = """\
## Soak

{clients} clients, each with a connection and a thread of its own, against one worker process for {seconds:g} s on loopback.
Every client sends its own random requests ({tokens} tokens, {inputs} × {outputs}, three bytes up, two down) and compares
each reply with the exact one. *Memory*: the worker's resident set at the end, and its growth after a tenth of the time.
"""


@dataclass
class _Tally:
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    errors: list[str] = field(default_factory=list)


def run(quick: bool) -> str:
    """Return Markdown: one row per transport."""
    seconds = QUICK_SECONDS if quick else float(os.environ.get("HECOMPILE_BENCHMARK_SOAK", SECONDS))
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        bundle = write_random_bundle(Path(scratch) / "worker", {"linear": (IN, OUT)})
        for name, listen in ADDRESSES.items():
            rows.append([name, *_soak(bundle, listen, seconds)])
    headings = ["transport", "requests", "wrong", "failed", "p50 ms", "p99 ms", "memory, MB", "growth"]
    prose = PROSE.format(clients=CLIENTS, seconds=seconds, tokens=TOKENS, inputs=IN, outputs=OUT)
    return f"{prose}\n\n{table(headings, rows)}"


def _soak(bundle: WorkerBundle, listen: str, seconds: float) -> list[object]:
    weight = bundle.weight("linear.forward")
    with running_worker(bundle.directory, ("--listen", listen)) as (process, address):
        tallies = [_Tally() for _ in range(CLIENTS)]
        stop = time.monotonic() + seconds
        threads = [
            threading.Thread(target=_client, args=(address, index, weight, stop, tally))
            for index, tally in enumerate(tallies)
        ]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 10)
        early, _ = resident_bytes(process.pid)
        for thread in threads:
            thread.join()
        late, _ = resident_bytes(process.pid)
    times = np.array([time_ for tally in tallies for time_ in tally.seconds])
    failed = [error for tally in tallies for error in tally.errors]
    return [
        len(times), sum(tally.wrong for tally in tallies), f"{len(failed)} {failed[:1] or ''}".strip(),
        1e3 * float(np.percentile(times, 50)), 1e3 * float(np.percentile(times, 99)), late / 1e6,
        f"{100 * (late / early - 1):+.1f} %",
    ]  # fmt: skip


def _client(address: str, index: int, weight: np.ndarray, stop: float, tally: _Tally) -> None:
    random = np.random.default_rng(index)
    requests = [random.integers(0, 256, (3, TOKENS - shorter, IN), dtype=np.uint8) for shorter in range(4)]
    answers = [encrypted_linear_reference(planes, weight, 16) for planes in requests]
    transport = connect(address)
    try:
        open_connection(transport, PLAN_ID)
        while time.monotonic() < stop:
            choice = int(random.integers(len(requests)))
            start = time.perf_counter()
            answer = transport.evaluate("linear.forward", requests[choice])
            tally.seconds.append(time.perf_counter() - start)
            tally.wrong += not np.array_equal(answer.planes, answers[choice])
    except Exception as error:
        tally.errors.append(f"{type(error).__name__}: {error}")
    finally:
        transport.close()
