"""Run `hecompile export llama`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hecompile.cli.options import wide_console
from hecompile.graph.llama import LLAMA_LINEARS


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
    ] = ",".join(LLAMA_LINEARS),
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
            "its time and your download. `inspect` shows how many bytes, `python -m benchmarks hintless` the time.",
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
    from hecompile.compiler.circuit_writer import RESUMED
    from hecompile.compiler.frontend import load_config
    from hecompile.compiler.linear import CompileOptions, compile_checkpoint
    from hecompile.compiler.phases import PhaseClock
    from hecompile.compiler.staging import staging_path
    from hecompile.errors import InputError
    from hecompile.he.random.sampling import PublicSeed
    from hecompile.inspection.prediction import ModelSize, prediction_table
    from hecompile.passes.offload.attach_lora import AttachLora

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
    console = wide_console()
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


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _lengths(text: str) -> tuple[int, ...]:
    from hecompile.errors import InputError

    try:
        return tuple(int(part) for part in _split(text))
    except ValueError:
        raise InputError(f"--sequence-buckets must be whole numbers with commas between, got {text!r}") from None
