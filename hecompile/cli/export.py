"""Run `hecompile export MODEL` and `hecompile export llama`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hecompile.cli.export_options import BatchOptions, EncryptionOptions, LoraOptions
from hecompile.cli.groups import with_groups
from hecompile.cli.options import BuildDirectory, CheckpointName, ModelArgument, PolynomialChoice
from hecompile.errors import InputError
from hecompile.terminal import progress_bar, wide_console

if TYPE_CHECKING:  # imported when a command runs: help is to be quick
    from rich.console import Console
    from rich.table import Table

    from hecompile.compiler.linear import CompileOptions
    from hecompile.passes.offload.attach_lora import AttachLora


@with_groups
def export_llama(
    model: CheckpointName,
    out: BuildDirectory,
    lora: LoraOptions,
    encryption: EncryptionOptions,
    batches: BatchOptions,
    polynomials: PolynomialChoice,
) -> None:
    """Export a Hugging Face Llama to ONNX and compile it: a client bundle (plan, hints, tokenizer, secret check vectors) and
    a worker bundle (integer circuits, public).

    Keep the client bundle: whoever has its check vectors can return wrong results that pass. Keys are drawn for each
    request and never stored."""
    _export(model, out, lora, encryption, batches, polynomials)


@with_groups
def export_model(
    model: ModelArgument,
    out: BuildDirectory,
    lora: LoraOptions,
    encryption: EncryptionOptions,
    batches: BatchOptions,
    polynomials: PolynomialChoice,
) -> None:
    """Export a Hugging Face model of any supported family (docs/models.md) to ONNX and compile it.

    The result is a client bundle (plan, hints, tokenizer, secret check vectors) and a worker bundle (integer circuits,
    public). Keep the client bundle: whoever has its check vectors can return wrong results that pass. Keys are drawn for
    each request and never stored."""
    _export(model, out, lora, encryption, batches, polynomials)


def _export(
    model: str,
    out: Path,
    lora: LoraOptions,
    encryption: EncryptionOptions,
    batches: BatchOptions,
    polynomials: PolynomialChoice,
) -> None:
    from hecompile.bundles.kinds import BundleKind
    from hecompile.checkpoint.configuration import family_of
    from hecompile.checkpoint.families import all_linears
    from hecompile.checkpoint.weights import empty_model
    from hecompile.compiler.frontend import load_config
    from hecompile.compiler.target import check_target

    _compile_options(
        lora.attach(all_linears()), encryption, batches, polynomials
    )  # refused before anything is looked up
    check_target(out, BundleKind.CLIENT)
    config = load_config(model)
    family = family_of(config)
    options = _compile_options(lora.attach(family.linears), encryption, batches, polynomials)
    options.lora.check_paths(path for path, _ in empty_model(config).named_modules())
    console = wide_console()
    console.print(predicted_sizes(model, options))
    if family.experts is not None and options.experts == "routed":
        console.print(
            "--experts routed: the worker will learn which experts are asked, from which it can read answers.",
            soft_wrap=True,
        )
    plan_id = _compile(model, out, options, console)
    console.print(_chosen(out), soft_wrap=True)
    console.print(f"plan {plan_id}\nclient bundle: {out / 'client'}\nworker bundle: {out / 'worker'}", soft_wrap=True)


def _compile_options(
    lora: AttachLora, encryption: EncryptionOptions, batches: BatchOptions, polynomials: PolynomialChoice
) -> CompileOptions:
    from hecompile.compiler.linear import CompileOptions

    if encryption.placement not in ("offload", "cheapest"):
        raise InputError(f"--placement must be offload or cheapest, got {encryption.placement!r}")
    head = encryption.head or ("local" if encryption.placement == "offload" else "auto")
    if head not in ("local", "remote", "auto"):
        raise InputError(f"--head must be local, remote or auto, got {head!r}")
    if encryption.experts not in ("routed", "all"):
        raise InputError(f"--experts must be routed or all, got {encryption.experts!r}")
    if encryption.bounds not in ("calibrated", "proven"):
        raise InputError(f"--bounds must be calibrated or proven, got {encryption.bounds!r}")
    return CompileOptions(
        lora=lora,
        effective_bits=encryption.precision,
        weight_bits=encryption.bits(),
        calibration=encryption.calibration,
        ring=encryption.ring,
        batch_size=batches.batch_size,
        sequence_buckets=batches.lengths(),
        public_seed=encryption.seed(),
        policy="offload" if encryption.placement == "offload" else "cheapest",
        head="remote" if head == "remote" else "auto" if head == "auto" else "local",
        bounds="proven" if encryption.bounds == "proven" else "calibrated",
        hints=encryption.hints_option(),
        experts="routed" if encryption.experts == "routed" else "all",
        attention=polynomials.attention,
        norm=polynomials.norm,
        activation=polynomials.activation,
        unconverted=polynomials.unconverted,
    )


def predicted_sizes(model: str, options: CompileOptions) -> Table:
    """Return a table of what hints, client and worker will take for a checkpoint. Only its configuration is read.

    Raises InputError for a checkpoint that cannot be read or is of another architecture.
    """
    from hecompile.compiler.frontend import load_config
    from hecompile.inspection.prediction import ModelSize, prediction_table

    tokens = options.batch_size * options.sequence_buckets[-1]
    size = ModelSize.of(load_config(model), options.lora.adapts)
    stored = options.hints == "stored"
    return prediction_table(size, options.weight_bits, tokens, options.ring_parameters(), stored_hints=stored)


def _chosen(out: Path) -> str:
    """Say which ring a build has, with its security, and which precision was reached."""
    from hecompile.bundles.client import read_plan
    from hecompile.bundles.kinds import CLIENT
    from hecompile.he.security import show_bits
    from hecompile.inspection.linear import reached_precision

    plan = read_plan(out / CLIENT)
    ring = plan.ring.ring()
    return f"ring {ring.ring_dim} x {ring.rank}, security {show_bits(ring.security_bits)}\n" + (
        f"precision: {reached_precision(plan)}"
    )


def _compile(model: str, out: Path, options: CompileOptions, console: Console) -> str:
    """Compile with a progress bar, print the seconds of the phases, and return the plan's identifier."""
    from hecompile.compiler.circuit_writer import RESUMED
    from hecompile.compiler.linear import compile_checkpoint
    from hecompile.compiler.phases import PhaseClock
    from hecompile.compiler.staging import staging_path

    clock = PhaseClock()
    with progress_bar(console) as bar:
        task = bar.add_task("load", total=1)

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
        bar.update(task, description="complete", completed=1, total=1)
    console.print(clock.summary(), soft_wrap=True)
    return plan_id
