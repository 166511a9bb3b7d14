"""Run the whole path on the shipped small Llama, and the same training in plaintext beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hecompile.bundles.kinds import CLIENT, WORKER, BundleKind
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.compiler.target import check_target
from hecompile.errors import InputError
from hecompile.files import only_writer
from hecompile.models import RECIPES, TINY_LLAMA
from hecompile.runtime.client.session import open_session
from hecompile.runtime.model.adapter import AdapterModel
from hecompile.runtime.model.data import eos_and_pad, load_examples
from hecompile.runtime.model.evaluation import Evaluation, evaluate
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.recipes.training import Recipe, load_recipe
from hecompile.runtime.training.comparison import LossComparison, StepSplit, compare_losses, step_split
from hecompile.runtime.training.metrics import METRICS_FILE
from hecompile.runtime.training.train import check_training, run_training
from hecompile.runtime.worker.process import worker_process
from hecompile.terminal import counted, progress_bar, shown_path

RECIPE = RECIPES / "demo.yaml"
BATCH_SIZE, SEQUENCE_BUCKETS = 16, (32, 48)


def run_demo(out: Path, console: Console, precision: float = 8.0, changes: Sequence[str] = ()) -> None:
    """Export, train encrypted over a socket, train in plaintext, print the comparison.

    `changes` are overrides of the recipe for both runs, such as `training.max_steps=20`. Everything is checked before
    anything is written; an earlier build and earlier runs in `out` are then replaced, and nothing else there is touched.
    Raises InputError where something does not fit.
    """
    with only_writer(out, f"--out {out}", folder=True):
        _run(out, console, precision, changes)


def _run(out: Path, console: Console, precision: float, changes: Sequence[str]) -> None:
    build, runs = out / "build", out / "runs"
    options = CompileOptions(batch_size=BATCH_SIZE, sequence_buckets=SEQUENCE_BUCKETS, effective_bits=precision)
    check_target(build, BundleKind.CLIENT)
    overrides = [*changes, f"model={build / CLIENT}", "training.overwrite_output_dir=true"]
    plain_recipe = load_recipe(RECIPE, [*overrides, f"training.output_dir={runs / 'plaintext'}"])
    plain = _checked_plaintext(plain_recipe, options)
    with progress_bar(console) as bar:
        task = bar.add_task("export", total=1)
        plan_id = compile_checkpoint(
            str(TINY_LLAMA),
            build,
            options,
            lambda what, done, total: bar.update(task, description=f"export: {what}", completed=done, total=total),
        )
        bar.update(task, description="export: complete", completed=1, total=1)
    console.print(f"exported {TINY_LLAMA.name}: plan {plan_id[:16]}, bundles in {build}", soft_wrap=True)
    with worker_process(build / WORKER) as address:
        recipe = load_recipe(RECIPE, [*overrides, f"training.output_dir={runs / 'encrypted'}", f"worker={address}"])
        with open_session(recipe) as session:
            console.print(f"worker process on {address}; encrypted training of {counted(recipe.training.max_steps, 'step')}")
            initial = {name: value.detach().clone() for name, value in session.model.adapter_state().items()}
            before = held_out(session.model, session.tokenizer, recipe)
            result = run_training(session.model, session.tokenizer, recipe)
            after = held_out(session.model, session.tokenizer, recipe)
    console.print("plaintext training: PEFT on the original float32 checkpoint, same seed and data order")
    plain.load_adapter_state(initial)
    plain_before = held_out(plain, session.tokenizer, plain_recipe)
    run_training(plain, session.tokenizer, plain_recipe)
    plain_after = held_out(plain, session.tokenizer, plain_recipe)
    encrypted_metrics, plain_metrics = runs / "encrypted" / METRICS_FILE, runs / "plaintext" / METRICS_FILE
    console.print(quality(before, after, plain_before, plain_after))
    console.print(costs(step_split(encrypted_metrics), step_split(plain_metrics)))
    console.print(agreement(compare_losses(encrypted_metrics, plain_metrics)))
    console.print(f"PEFT adapter: {shown_path(result.adapter_dir)}", soft_wrap=True)


def _checked_plaintext(recipe: Recipe, options: CompileOptions) -> PlaintextPeftModel:
    """Return the model to compare with. Raises InputError where the recipe or its data do not fit it."""
    if recipe.data.validation_file is None:
        raise InputError("the demo compares what is known of held-out text: data.validation_file cannot be left out")
    model = PlaintextPeftModel.from_pretrained(TINY_LLAMA, options.lora.peft_config, SEQUENCE_BUCKETS, BATCH_SIZE)
    check_training(model, AutoTokenizer.from_pretrained(TINY_LLAMA), recipe)
    return model


def held_out(model: AdapterModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Evaluation:
    """Evaluate on the recipe's validation file."""
    assert recipe.data.validation_file is not None
    examples = load_examples(recipe.data.validation_file, tokenizer, model.sequence_buckets)
    torch.manual_seed(recipe.training.seed)  # evaluation draws nothing; the runs that follow start alike
    return evaluate(model, examples, eos_and_pad(tokenizer)[1])


def quality(before: Evaluation, after: Evaluation, plain_before: Evaluation, plain_after: Evaluation) -> Table:
    """Show loss and exact match of both runs, before and after."""
    table = Table(title="held-out paraphrases of the private questions")
    for heading in ("", "loss before", "loss after", "exact match before", "exact match after"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, first, last in (("encrypted", before, after), ("plaintext PEFT", plain_before, plain_after)):
        matches = [f"{100 * (evaluation.exact_match or 0.0):.1f} %" for evaluation in (first, last)]
        table.add_row(name, f"{first.loss:.4f}", f"{last.loss:.4f}", *matches)
    return table


def costs(encrypted: StepSplit, plain: StepSplit) -> Table:
    """Show where the time of a step went, and the bytes on the wire."""
    table = Table(title="one optimizer step (median), and the wire")
    table.add_column("")
    for heading in ("encrypted", "plaintext PEFT"):
        table.add_column(heading, justify="right")
    table.add_row("seconds per step", f"{encrypted.seconds:.3f}", f"{plain.seconds:.3f}")
    table.add_row("  client cryptography", f"{encrypted.client_crypto:.3f}", "")
    table.add_row("  client model", f"{encrypted.client_model:.3f}", f"{plain.client_model:.3f}")
    table.add_row("  worker", f"{encrypted.worker:.3f}", "")
    table.add_row("  wire", f"{encrypted.wire:.3f}", "")
    table.add_row("bytes per token up", f"{encrypted.bytes_up_per_token:.0f}", "0")
    table.add_row("bytes per token down", f"{encrypted.bytes_down_per_token:.0f}", "0")
    return table


def agreement(comparison: LossComparison) -> str:
    """Say whether the encrypted run followed the plaintext one at every step."""
    verdict = "within" if comparison.follows else "NOT within"
    return (
        f"training loss of the encrypted run over {comparison.steps} steps: {verdict} 1 % or 0.01 nats of plaintext at "
        f"every step; largest difference {comparison.largest_difference:.4f} nats, worst step {comparison.worst_step} at "
        f"{comparison.worst_ratio:.2f} of the tolerance"
    )
