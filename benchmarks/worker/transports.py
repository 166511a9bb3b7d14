"""Measure transports on the loopback: bytes per second, and the latency of small requests, with a worker that does no work.

    python -m benchmarks transports [--quick]

The worker's engine returns a reply made beforehand (`benchmarks.worker.fixed_reply`). All that is measured is the way of the
byte planes to it and back: encoding, copies, the kernel, and the checks of client and worker. Each worker is a process of
its own, except in process. Requests in flight share one connection where it carries several, else have one each.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.processes import module_process, next_event
from benchmarks.report import table
from benchmarks.timing import paired
from benchmarks.worker.fixed_reply import FixedReplyEngine
from benchmarks.worker.linears import PLAN_ID, REPLY_BYTES, UPLOAD_LIMBS, random_planes, write_random_bundle
from hecompile.bundles.worker import WorkerBundle
from hecompile.errors import InputError
from hecompile.runtime.transports import InProcessTransport, Transport, connect
from hecompile.runtime.wire.credentials import ClientCredentials
from hecompile.runtime.wire.development_certificates import AUTHORITY, TOKEN, make_development_certificates
from hecompile.runtime.worker.worker import Worker

LARGE, SMALL = "large.forward", "small.forward"
LARGE_SHAPE, SMALL_SHAPE = (2048, 8192), (64, 64)
IN_FLIGHT = (1, 4)
GIGABYTE = 1e9


@dataclass(frozen=True)
class Kind:
    """Describe a way to a worker. listen: its address, `{folder}` being a folder of the run; None: in process."""

    name: str
    listen: str | None
    needs: str | None = None
    """A module without which there is no such transport."""

    tls: bool = False


KINDS = (
    Kind("in process", None),
    Kind("frames, TCP", "tcp://127.0.0.1:0"),
    Kind("frames, Unix socket", "unix://{folder}/socket"),
    Kind("Arrow Flight", "flight://127.0.0.1:0", "hecompile.runtime.transports.flight"),
    Kind("Arrow Flight, TLS and token", "flights://127.0.0.1:0", "hecompile.runtime.transports.flight", tls=True),
    Kind("Open Inference Protocol, gRPC", "grpc://127.0.0.1:0", "hecompile.runtime.transports.oip"),
)


@dataclass(frozen=True)
class Measured:
    """Hold the figures of a kind: bytes per second by requests in flight; seconds of small requests, one at a time."""

    bytes_per_second: dict[int, float]
    latencies: list[float]


def run(quick: bool) -> str:
    """Return the section as Markdown. quick: small payloads and few requests; its figures are no measurement."""
    tokens, requests, rounds, small = (16, 4, 2, 20) if quick else (512, 8, 9, 300)
    kinds = [kind for kind in KINDS if available(kind)]
    measured = measure(kinds, tokens, requests, rounds, small)
    up, down = UPLOAD_LIMBS * tokens * LARGE_SHAPE[0], REPLY_BYTES * tokens * LARGE_SHAPE[1]
    rows = [
        [name, *(result.bytes_per_second[count] / GIGABYTE for count in IN_FLIGHT), *_percentiles(result.latencies)]
        for name, result in measured.items()
    ]
    headings = ["transport", *(f"GB/s, {count} in flight" for count in IN_FLIGHT), "p50 µs", "p99 µs"]
    absent = ", ".join(kind.name for kind in KINDS if kind not in kinds)
    return (
        "## Transports\n\n"
        f"Loopback, a worker process whose engine returns a fixed reply at once. GB/s: planes up and down ({up / 1e6:.1f} "
        f"and {down / 1e6:.1f} MB a request) over the wall time of {requests} requests, median of {rounds} interleaved "
        "rounds; 10^9 bytes. In process no byte is moved: it shows what the checks of both sides take. "
        f"Latency: {small} requests of one token, {UPLOAD_LIMBS * SMALL_SHAPE[0]} bytes up, "
        f"{REPLY_BYTES * SMALL_SHAPE[1]} down, one at a time."
        + (f" Not installed: {absent}." if absent else "")
        + "\n\n"
        + table(headings, rows)
    )


def available(kind: Kind) -> bool:
    """Return whether this program has such a transport, and the packages it needs."""
    if kind.needs is None:
        return True
    try:
        if importlib.util.find_spec(kind.needs) is None:
            return False
        importlib.import_module(kind.needs)
    except (ImportError, InputError):
        return False
    return True


def measure(kinds: list[Kind], tokens: int, requests: int, rounds: int, small: int) -> dict[str, Measured]:
    """Measure all kinds, in turn in every round; the figures by the kind's name."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bundle = write_random_bundle(folder / "worker", {"large": LARGE_SHAPE, "small": SMALL_SHAPE})
        make_development_certificates(folder / "credentials")
        connections = {kind.name: stack.enter_context(_connections(kind, bundle, folder)) for kind in kinds}
        threads = stack.enter_context(ThreadPoolExecutor(max(IN_FLIGHT)))
        planes = random_planes(tokens, LARGE_SHAPE[0])
        seconds = {
            count: paired(
                {name: partial(_burst, threads, own, planes, count, requests) for name, own in connections.items()},
                rounds,
            )
            for count in IN_FLIGHT
        }
        latencies = _latencies({name: own[0] for name, own in connections.items()}, small)
    size = requests * tokens * (UPLOAD_LIMBS * LARGE_SHAPE[0] + REPLY_BYTES * LARGE_SHAPE[1])
    return {
        kind.name: Measured(
            {count: size / seconds[count][kind.name].seconds for count in IN_FLIGHT}, latencies[kind.name]
        )
        for kind in kinds
    }


@contextlib.contextmanager
def _connections(kind: Kind, bundle: WorkerBundle, folder: Path) -> Iterator[list[Transport]]:
    """Open as many transports as there are requests in flight at most: one, again and again, if it carries several."""
    with contextlib.ExitStack() as stack:
        own = None
        if kind.listen is None:
            worker = Worker(bundle, FixedReplyEngine(bundle))
            open_one: Callable[[], Transport] = partial(InProcessTransport, worker.exchange)
        else:
            made = folder / "credentials" if kind.tls else None
            if made is not None:
                own = ClientCredentials.load(made / AUTHORITY, token=made / TOKEN)
            arguments = [str(bundle.directory), kind.listen.format(folder=folder), *([str(made)] if made else [])]
            worker_process = stack.enter_context(module_process("benchmarks.worker.fixed_reply", *arguments))
            open_one = partial(connect, next_event(worker_process, "listening")["address"], credentials=own)
        transports = [open_one()]
        if transports[0].concurrent:
            transports *= max(IN_FLIGHT)
        else:
            transports += [open_one() for _ in range(max(IN_FLIGHT) - 1)]
        for transport in transports:
            stack.callback(transport.close)
            transport.hello(PLAN_ID)  # and no known answer: this worker would not pass
        yield transports


def _burst(
    threads: ThreadPoolExecutor, transports: list[Transport], planes: np.ndarray, in_flight: int, requests: int
) -> None:
    """Send `requests` requests, `in_flight` at once, each from a thread of its own."""

    def send(transport: Transport) -> None:
        for _ in range(requests // in_flight):
            transport.evaluate(LARGE, planes)

    for done in [threads.submit(send, transport) for transport in transports[:in_flight]]:
        done.result()


def _latencies(transports: dict[str, Transport], count: int) -> dict[str, list[float]]:
    """Measure the seconds of `count` small requests each, the transports in turn."""
    planes = random_planes(1, SMALL_SHAPE[0])
    seconds: dict[str, list[float]] = {name: [] for name in transports}
    for _ in range(count):
        for name, transport in transports.items():
            started = time.perf_counter()
            transport.evaluate(SMALL, planes)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def _percentiles(seconds: list[float]) -> list[str]:
    return [f"{1e6 * float(np.percentile(seconds, percent)):.0f}" for percent in (50, 99)]
