"""`hecompile worker`: the command line of the untrusted side."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Optional

import typer

worker_app = typer.Typer(no_args_is_help=True, help="Run the untrusted side.")


@worker_app.command("serve")
def worker_serve(
    bundle: Annotated[Path, typer.Argument(help="The worker bundle (build/worker).")],
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
            "onnxruntime), vnni, torch, torch-cuda, onnxruntime, or concrete (TFHE, tiny circuits)."
        ),
    ] = "auto",
    tls_certificate: Annotated[
        Optional[Path],  # noqa: UP045  typer evaluates it
        typer.Option(help="PEM of the certificate chain that the worker shows to clients."),
    ] = None,
    tls_key: Annotated[Optional[Path], typer.Option(help="PEM of its private key.")] = None,  # noqa: UP045
    client_authority: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="PEM of an authority: only clients with a certificate that it signed can connect."),
    ] = None,
    token_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Tokens, one per line: a client must send one with every request."),
    ] = None,
    development_certificates: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="In place of those four, for trying things out: a folder of certificates and a token, which are made if "
            "it has none. A client needs authority.pem, client.pem, client.key and token from it."
        ),
    ] = None,
    allow_plaintext_network: Annotated[
        bool, typer.Option(help="Listen on an address other machines can reach, without authentication or TLS.")
    ] = False,
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Serve some decoder layers only, FIRST-LAST counted from 0; other workers serve the rest."),
    ] = None,
    metrics: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Serve Prometheus metrics at HOST:PORT/metrics."),
    ] = None,
    log_format: Annotated[str, typer.Option(help="text, or json: one object per line.")] = "text",
    events: Annotated[
        str, typer.Option(help="What is printed for people, text, or for the program that started it, json.")
    ] = "text",
    verbose: Annotated[
        bool, typer.Option(help="Log every request (circuit, tokens, seconds; never the payload).")
    ] = False,
) -> None:
    """Serve a worker bundle until interrupted. The worker sees public weights and ciphertexts, nothing else."""
    from hecompile.bundles.worker import WorkerBundle
    from hecompile.errors import InputError
    from hecompile.runtime.wire.credentials import ServerCredentials
    from hecompile.runtime.wire.events import emit
    from hecompile.runtime.worker.engines import create_engine
    from hecompile.runtime.worker.engines.base import Engine
    from hecompile.runtime.worker.metering import MeteredEngine
    from hecompile.runtime.worker.servers.serve import serve
    from hecompile.runtime.worker.shards import parse_layers, shard
    from hecompile.runtime.worker.worker import Worker

    if events not in ("text", "json"):
        raise InputError(f"--events is text or json, got {events!r}")
    _set_up_logging(log_format, verbose)
    named = (tls_certificate, tls_key, client_authority, token_file)
    if development_certificates is None:
        credentials = ServerCredentials.load(*named)
    elif any(path is not None for path in named):
        raise InputError("--development-certificates stands in place of the four other options; drop it or them")
    else:
        from hecompile.runtime.wire.development_certificates import development_credentials

        credentials = development_credentials(development_certificates, listen)
    opened = WorkerBundle.open(bundle)
    if layers is not None:
        opened = shard(opened, parse_layers(layers))
    chosen: Engine = create_engine(engine, opened)
    if metrics is not None:
        chosen = metered = MeteredEngine(chosen)
        host, port = metered.serve(metrics)
        logging.getLogger(__name__).info("metrics at http://%s:%d/metrics", host, port)
    worker = Worker(opened, chosen)

    def ready(address: str) -> None:
        if events == "json":
            emit("listening", address=address)
        else:
            print(f"listening on {address}", flush=True)

    serve(
        worker,
        listen,
        ready=ready,
        credentials=credentials,
        allow_plaintext_network=allow_plaintext_network,
    )


@worker_app.command("deploy")
def worker_deploy(
    fleet: Annotated[Path, typer.Argument(help="YAML file: bundle, shards, replicas, listen; see docs/fleet.md.")],
) -> None:
    """Run a fleet of workers on Ray Serve until interrupted; prints the address of their directory."""
    import signal
    import threading

    from hecompile.runtime.worker.servers.fleet import deploy, load_fleet, stop

    loaded = load_fleet(fleet)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        print(f"workers: {deploy(loaded)}", flush=True)
        stopped.wait()
    finally:
        stop()


def _set_up_logging(log_format: str, verbose: bool) -> None:
    from hecompile.errors import InputError
    from hecompile.runtime.worker.metering import JsonFormatter

    if log_format not in ("text", "json"):
        raise InputError(f"--log-format is text or json, got {log_format!r}")
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(name)s %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    for noisy in ("matplotlib", "numba", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
