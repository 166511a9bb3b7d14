"""Run `hecompile worker serve` and `deploy`: the untrusted side."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hecompile.cli.console import EVENTS, check_events, tell_address
from hecompile.cli.groups import with_groups
from hecompile.cli.options import WorkerBundlePath
from hecompile.errors import InputError

if TYPE_CHECKING:  # imported when a command runs: help is to be quick
    from hecompile.runtime.wire.credentials import ServerCredentials

worker_app = typer.Typer(no_args_is_help=True, help="Run the untrusted side.")


@dataclass(frozen=True)
class NetworkOptions:
    """Hold what the worker shows to clients on a network, and asks of them."""

    panel = "Clients on other machines"
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM of the certificate chain that the worker shows to clients.")
    ] = None
    tls_key: Annotated[Path | None, typer.Option(help="PEM of the private key of --tls-certificate.")] = None
    client_authority: Annotated[
        Path | None,
        typer.Option(help="PEM of an authority: only clients with a certificate that it signed can connect."),
    ] = None
    token_file: Annotated[
        Path | None, typer.Option(help="Tokens, one per line: a client must send one with every request.")
    ] = None
    development_certificates: Annotated[
        Path | None,
        typer.Option(
            help="In place of those four, for trying things out: a folder of certificates and a token, which are made if "
            "it has none. A client needs authority.pem, client.pem, client.key and token from it."
        ),
    ] = None
    allow_plaintext_network: Annotated[
        bool, typer.Option(help="Listen on an address other machines can reach, without authentication or TLS.")
    ] = False

    @contextmanager
    def credentials(self, listen: str) -> Iterator[tuple[ServerCredentials, Callable[[], None]]]:
        """Read the files, or make development credentials for the address `listen`.

        Yields the credentials and a function that says that they are used: new ones are removed where it was not called.
        Raises InputError for files that are damaged or missing and for options that exclude each other.
        """
        from hecompile.runtime.wire.credentials import ServerCredentials

        named = (self.tls_certificate, self.tls_key, self.client_authority, self.token_file)
        if self.development_certificates is None:
            yield ServerCredentials.load(*named), lambda: None
            return
        if any(path is not None for path in named):
            raise InputError("--development-certificates stands in place of the four other options; drop it or them")
        from hecompile.runtime.wire.development_certificates import development_credentials

        with development_credentials(self.development_certificates, listen) as made:
            yield made


@dataclass(frozen=True)
class LogOptions:
    """Hold what is told of the worker's work, and how."""

    panel = "Logs and metrics"
    metrics: Annotated[str | None, typer.Option(help="Serve Prometheus metrics at HOST:PORT/metrics.")] = None
    log_format: Annotated[str, typer.Option(help="text, or json: one object per line.")] = "text"
    events: Annotated[str, EVENTS] = "text"
    verbose: Annotated[bool, typer.Option(help="Log every request (circuit, tokens, seconds; never the payload).")] = (
        False
    )

    def set_up(self) -> None:
        """Log to standard error. Raises InputError for an unknown format."""
        from hecompile.runtime.worker.metering import JsonFormatter

        check_events(self.events)
        if self.log_format not in ("text", "json"):
            raise InputError(f"--log-format is text or json, got {self.log_format!r}")
        handler = logging.StreamHandler()
        text = logging.Formatter("%(asctime)s %(name)s %(message)s")
        handler.setFormatter(JsonFormatter() if self.log_format == "json" else text)
        logging.basicConfig(level=logging.DEBUG if self.verbose else logging.INFO, handlers=[handler])
        for noisy in ("matplotlib", "numba", "asyncio"):
            logging.getLogger(noisy).setLevel(logging.WARNING)


@worker_app.command("serve")
@with_groups
def worker_serve(
    bundle: WorkerBundlePath,
    network: NetworkOptions,
    logs: LogOptions,
    listen: Annotated[
        str,
        typer.Option(
            help="tcp://127.0.0.1:PORT (0 picks a free one) or unix:///path/to/socket; flight:// or flights://HOST:PORT for "
            "Arrow Flight, grpc:// or grpcs://HOST:PORT for Open Inference Protocol v2, the second of each over TLS."
        ),
    ] = "tcp://127.0.0.1:7700",
    engine: Annotated[
        str,
        typer.Option(
            help="auto (vnni where the CPU has AVX512-VNNI, else torch where it has AVX-VNNI or is not x86, else "
            "onnxruntime), vnni, torch, torch-cuda, onnxruntime, or concrete (TFHE, tiny circuits). `hecompile doctor` says "
            "which of them this machine can run."
        ),
    ] = "auto",
    layers: Annotated[
        str | None,
        typer.Option(help="Serve some decoder layers only, FIRST-LAST counted from 0; other workers serve the rest."),
    ] = None,
) -> None:
    """Serve a worker bundle until interrupted. The worker sees public weights and ciphertexts, nothing else."""
    from hecompile.bundles.worker import WorkerBundle
    from hecompile.runtime.worker.engines import create_engine
    from hecompile.runtime.worker.engines.base import Engine
    from hecompile.runtime.worker.metering import MeteredEngine
    from hecompile.runtime.worker.servers.serve import serve
    from hecompile.runtime.worker.shards import parse_layers, shard
    from hecompile.runtime.worker.worker import Worker

    logs.set_up()
    with network.credentials(listen) as (credentials, keep):
        opened = WorkerBundle.open(bundle)
        if layers is not None:
            opened = shard(opened, parse_layers(layers))
        chosen: Engine = create_engine(engine, opened)
        if logs.metrics is not None:
            chosen = metered = MeteredEngine(chosen)
            host, port = metered.serve(logs.metrics)
            logging.getLogger(__name__).info("metrics at http://%s:%d/metrics", host, port)

        def ready(address: str) -> None:
            keep()
            tell_address(logs.events, address)

        serve(
            Worker(opened, chosen),
            listen,
            ready=ready,
            credentials=credentials,
            allow_plaintext_network=network.allow_plaintext_network,
        )


@worker_app.command("deploy")
def worker_deploy(
    fleet: Annotated[Path, typer.Argument(help="YAML file: bundle, shards, replicas, listen; see docs/fleet.md.")],
) -> None:
    """Run a fleet of workers on Ray Serve until interrupted; prints the address of their directory."""
    import signal
    import threading

    from hecompile.runtime.worker.servers.fleet import deploy, load_fleet, stop

    def interruptible() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)

    loaded = load_fleet(fleet)
    running = False
    interruptible()  # also while the fleet starts, which may take minutes
    try:
        address = deploy(loaded, lambda text: print(text, file=sys.stderr, flush=True))
        interruptible()  # Ray has handlers of its own
        running = True
        print(f"workers: {address}", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        if not running:
            raise
    finally:
        stop()
