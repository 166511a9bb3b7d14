"""The command line. Each command checks its options, calls one function of the library and prints the result."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hecompile.cli_ckks import ckks_app
from hecompile.cli_convert import convert
from hecompile.cli_federate import federate, federation_app
from hecompile.cli_infer import infer
from hecompile.cli_inspect import inspect
from hecompile.cli_privacy import privacy
from hecompile.cli_worker import worker_app
from hecompile.errors import HecompileError, WorkerError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compile an open-weight Llama so that you can LoRA-fine-tune it on private text while an untrusted worker does "
    "the heavy multiplications on ciphertexts only.\n\nThe usual order: `export llama`, `inspect`, `worker serve` (on the "
    "worker's machine), `train` (on yours).",
)
export_app = typer.Typer(no_args_is_help=True, help="Compile a checkpoint into a client bundle and a worker bundle.")
app.add_typer(export_app, name="export")
app.add_typer(worker_app, name="worker")
app.add_typer(federation_app, name="federation")
app.command()(federate)
app.add_typer(ckks_app, name="ckks")
app.command()(convert)
app.command()(inspect)
app.command()(infer)
app.command()(privacy)

ALL_LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160)


@export_app.command("llama")
def export_llama(
    model: Annotated[str, typer.Option(help="Checkpoint: a directory made by save_pretrained, or a hub id.")],
    out: Annotated[Path, typer.Option(help="Where to write client/ and worker/. An earlier build there is replaced.")],
    lora_r: Annotated[int, typer.Option(help="Rank r of the LoRA matrices (PEFT's r).")] = 8,
    lora_alpha: Annotated[float, typer.Option(help="LoRA scaling is lora_alpha / r (PEFT's lora_alpha).")] = 16.0,
    lora_dropout: Annotated[
        float, typer.Option(help="Dropout before lora_A, in training (PEFT's lora_dropout).")
    ] = 0.0,
    target_modules: Annotated[
        str, typer.Option(help="Comma-separated linears that get an adapter, any subset of the seven.")
    ] = ALL_LINEARS,
    precision: Annotated[
        float,
        typer.Option(
            help="Effective bits of every encrypted product: b bits mean noise of 2^-b of the result's own size (8: 0.4 %, "
            "about what bfloat16 rounding does). Fewer bits send fewer bytes. `inspect` shows what was reached."
        ),
    ] = 8.0,
    weight_bits: Annotated[
        int,
        typer.Option(
            help="Bits of the quantised frozen weights, 8 to 12. 8 is one product of bytes per limb on the worker and "
            "follows the loss of float32 training; more take up to twice the worker's time and follow its gradients too."
        ),
    ] = 10,
    ring: Annotated[
        Optional[str],  # noqa: UP045  typer evaluates it
        typer.Option(
            help="Ring dimension x module rank, e.g. 512x3. All that can be selected have at least 128 bits of security; "
            "by default the cheapest for the batch size is taken, the more secure where two cost about the same."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Most sequences per batch.")] = 8,
    sequence_buckets: Annotated[
        str, typer.Option(help="Comma-separated padded lengths; a batch takes the smallest that fits.")
    ] = "32,64,128",
    public_seed: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="64 hex digits: seed of the public matrix A. The same seed and input give the same bytes. By default a "
            "fresh one is drawn, so that work done against one bundle is worth nothing against another."
        ),
    ] = None,
    placement: Annotated[
        str,
        typer.Option(
            help="'offload': every decoder linear goes to the worker. 'cheapest': a minimum cut decides by cost; at small "
            "sizes it may keep everything on the client."
        ),
    ] = "offload",
    hints: Annotated[
        bool,
        typer.Option(
            "--hints/--no-hints",
            help="--no-hints stores no hints on the client; the worker then computes one with every product, which costs "
            "its time and your download. `inspect` shows how many bytes, `python -m benchmarks.hintless` the time.",
        ),
    ] = True,
    attention: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="softmax, or what stands for it: power, gaussian_kernel (both for models trained with them), chebyshev. By "
            "default what the checkpoint was converted for. See docs/polynomial.md."
        ),
    ] = None,
    norm: Annotated[Optional[str], typer.Option(help="exact or polynomial; default as above.")] = None,  # noqa: UP045
    activation: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="silu, polynomial, composed, or quantized (a table of 8 bits); default as above."),
    ] = None,
) -> None:
    """Export a Hugging Face Llama to ONNX and compile it: a client bundle (plan, hints, tokenizer) and a worker bundle
    (integer circuits). Both are public; the secrets are drawn at training time and never stored."""
    from hecompile.circuit_writer import RESUMED
    from hecompile.compiler import CompileOptions, compile_checkpoint
    from hecompile.errors import InputError
    from hecompile.frontend import load_config
    from hecompile.he.sampling import PublicSeed
    from hecompile.passes.attach_lora import AttachLora
    from hecompile.phases import PhaseClock
    from hecompile.prediction import ModelSize, prediction_table
    from hecompile.staging import staging_path

    if placement not in ("offload", "cheapest"):
        raise InputError(f"--placement must be offload or cheapest, got {placement!r}")
    options = CompileOptions(
        lora=AttachLora(lora_r, lora_alpha, lora_dropout, tuple(_split(target_modules))),
        effective_bits=precision,
        weight_bits=weight_bits,
        ring=ring,
        batch_size=batch_size,
        sequence_buckets=_lengths(sequence_buckets),
        public_seed=None if public_seed is None else PublicSeed.from_hex(public_seed),
        policy="offload" if placement == "offload" else "cheapest",
        stored_hints=hints,
        attention=attention,
        norm=norm,
        activation=activation,
    )
    console = _console()
    size = ModelSize.of(load_config(model))
    tokens = options.batch_size * options.sequence_buckets[-1]
    console.print(prediction_table(size, options.weight_bits, tokens, options.ring_parameters()))
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("load", total=1)
        clock = PhaseClock()

        def report(what: str, done: int, total: int) -> None:
            clock.report(what)
            if what == RESUMED:
                bar.console.print(f"going on from an interrupted export: {done} of {total} rows of hints are there")
            bar.update(task, description=what, completed=done, total=total)

        try:
            plan_id = compile_checkpoint(model, out, options, report)
        except KeyboardInterrupt:
            if staging_path(out).exists():
                raise KeyboardInterrupt("the same command goes on from here") from None
            raise
    console.print(clock.summary(), soft_wrap=True)
    console.print(f"plan {plan_id}\nclient bundle: {out / 'client'}\nworker bundle: {out / 'worker'}", soft_wrap=True)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; models/recipes/demo.yaml is a commented example.")],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Changes to the recipe, e.g. training.max_steps=20 worker=tcp://127.0.0.1:7700"),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in training.output_dir.")] = False,
    on_bad_worker: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="After a wrong reply: stop, or retry-elsewhere (the recipe then names several workers)."),
    ] = None,
) -> None:
    """LoRA fine-tuning with encrypted products. Writes checkpoints, metrics.jsonl and the adapter in PEFT's format."""
    from transformers.trainer_utils import get_last_checkpoint

    from hecompile.runtime.recipe import load_recipe
    from hecompile.runtime.session import open_session
    from hecompile.runtime.train import run_training

    policy = [] if on_bad_worker is None else [f"connection.on_bad_worker={on_bad_worker}"]
    loaded = load_recipe(recipe, [*(overrides or ()), *policy])
    output_dir, started = loaded.training.output_dir, time.time()
    with open_session(loaded) as session:
        try:
            result = run_training(session.model, session.tokenizer, loaded, resume=resume)
        except (KeyboardInterrupt, WorkerError) as error:
            last = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
            if last is None or not (resume or Path(last).stat().st_mtime >= started):  # none, or one of an earlier run
                raise
            on = f"the same command with --resume goes on from {Path(last).name}"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(on) from None
            raise type(error)(f"{str(error).rstrip('.')}. The steps up to there are kept: {on}") from None
    figures = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    _console().print(f"{result.steps} steps, {figures}\nadapter: {result.adapter_dir}", soft_wrap=True)
    if result.privacy is not None:
        _console().print(result.privacy, soft_wrap=True)


@app.command()
def doctor(
    worker: Annotated[str, typer.Argument(help="Where the worker listens, as in a recipe.")],
    plan: Annotated[Path, typer.Option(help="The client bundle (build/client) whose plan the worker serves.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per step to predict for.")] = 512,
    authority: Annotated[Optional[Path], typer.Option(help="PEM of who signed the worker's certificate.")] = None,  # noqa: UP045
    certificate: Annotated[Optional[Path], typer.Option(help="PEM that this client shows.")] = None,  # noqa: UP045
    key: Annotated[Optional[Path], typer.Option(help="PEM of its key.")] = None,  # noqa: UP045
    token: Annotated[Optional[Path], typer.Option(help="A file with the bearer token.")] = None,  # noqa: UP045
) -> None:
    """What to expect of a worker before training with it: protocol, exactness, link speed, predicted seconds per step."""
    from rich.table import Table

    from hecompile.bundles.client import ClientBundle
    from hecompile.prediction import megabytes
    from hecompile.runtime.doctor import diagnose
    from hecompile.runtime.transports import connect_for
    from hecompile.runtime.transports.credentials import ClientCredentials

    bundle = ClientBundle.open(plan)
    credentials = ClientCredentials.load(authority, certificate, key, token)
    console = _console()
    pool = connect_for(worker, 1, credentials)
    try:
        with console.status("asking the worker"):
            found = diagnose(bundle, pool, tokens)
    finally:
        pool.close()
    table = Table(title=f"{worker}, plan {bundle.plan_id[:16]}", show_header=False)

    def speed(value: float | None) -> str:
        return "too fast to tell" if value is None else f"{megabytes(round(value))}/s"

    for name, value in (
        ("protocol", f"version {found.protocol}, engine {found.engine}"),
        ("known answers", "exact"),
        ("round trip", f"{1e3 * found.round_trip:.2f} ms"),
        ("link up, down", f"{speed(found.up)}, {speed(found.down)}"),
        (f"a step of {tokens} tokens", f"{megabytes(found.bytes_step)} up and down"),
        ("– worker", f"{found.worker_step:.2f} s"),
        ("– wire", f"{found.wire_step:.2f} s"),
        ("– client cryptography (predicted)", f"{found.client_step:.2f} s"),
        ("together, one after the other", f"{found.step:.2f} s, and the client's own model"),
    ):
        table.add_row(name, value)
    console.print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the build, the runs and the report go; emptied first.")] = Path(
        "runs/make-demo"
    ),
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Changes to models/recipes/demo.yaml for both runs, e.g. training.max_steps=20"),
    ] = None,
    precision: Annotated[float, typer.Option(help="As for `export llama`.")] = 8.0,
) -> None:
    """The whole path on the shipped small Llama and private data: export, a worker process on a loopback socket, encrypted
    training, and the same by plaintext PEFT for comparison. One to four minutes on two cores."""
    from hecompile.demo import run_demo

    run_demo(out, _console(), precision, overrides or ())


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _lengths(text: str) -> tuple[int, ...]:
    from hecompile.errors import InputError

    try:
        return tuple(int(part) for part in _split(text))
    except ValueError:
        raise InputError(f"--sequence-buckets must be whole numbers with commas between, got {text!r}") from None


def main() -> None:
    """Entry point: bad input is one line on standard error and exit status 2; an interrupt is status 130."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Client and worker may share the cores: a thread that spins while it waits would take them from the other side.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except HecompileError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as ended:
        # typer makes status 130 of an interrupt. What a command raised it with says how to go on.
        stopped = ended.__context__ and ended.__context__.__cause__
        if isinstance(stopped, KeyboardInterrupt):
            print("; ".join(["interrupted", *map(str, stopped.args)]), file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
