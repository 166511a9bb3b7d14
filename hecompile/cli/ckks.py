"""Run `hecompile ckks export`, `serve` and `infer`: a polynomial model evaluated wholly on a worker."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hecompile.cli.console import EVENTS, check_events, tell_address
from hecompile.cli.groups import with_groups
from hecompile.cli.options import (
    MAX_NEW_TOKENS,
    WORKER_ADDRESS,
    AdapterPath,
    BuildDirectory,
    CheckpointName,
    ClientBundlePath,
    PolynomialChoice,
    WorkerBundlePath,
)
from hecompile.cli.prompts import Prompts, PromptsFile, gather_prompts, print_answer
from hecompile.terminal import counted, message_console, progress_bar

if TYPE_CHECKING:  # imported when a command runs: help is to be quick
    from hecompile.runtime.inference.answers import Prompt

ckks_app = typer.Typer(
    no_args_is_help=True,
    help="Evaluate a small polynomial model wholly on a worker, under CKKS: the client encrypts inputs, refreshes "
    "ciphertexts where the plan says and decrypts logits. Many independent prompts share the slots.",
)


@ckks_app.command("export")
@with_groups
def export(
    model: CheckpointName,
    out: BuildDirectory,
    polynomials: PolynomialChoice,
    sequence_length: Annotated[int, typer.Option(min=2, help="How many tokens a prompt has at most.")],
    adapter: AdapterPath = None,
    levels: Annotated[
        int, typer.Option(help="Multiplications between two refreshes: more take a larger ring; 0: no refreshes.")
    ] = 4,
    ring_dim: Annotated[
        int | None, typer.Option(help="Ring dimension; by default the smallest that has the levels at 128 bits.")
    ] = None,
    last_only: Annotated[
        bool, typer.Option(help="Logits of the last position alone; prompts then have --sequence-length tokens.")
    ] = False,
) -> None:
    """Compile a checkpoint, as a rule one made by `hecompile convert`, for evaluation on ciphertexts. The worker's half
    holds the weights, with the adapter merged into them."""
    from rich.markup import escape

    from hecompile.ckks.parameters import CkksParameters
    from hecompile.compiler.ckks import CkksOptions, export_polynomial
    from hecompile.he.security import show_bits

    options = CkksOptions(
        sequence_length, levels, ring_dim, polynomials.attention, polynomials.norm, polynomials.activation, last_only,
        polynomials.unconverted,
    )  # fmt: skip
    console = message_console()
    with console.status("load") as status:
        plan = export_polynomial(model, out, options, adapter, status.update)
    refreshed = sum(math.prod(shape) for shape in plan.refreshes.values())
    parameters = ", ".join(f"{name} {value}" for name, value in plan.parameters.items())
    console.print(
        f"{escape(str(out))}: depth {plan.depth}, {len(plan.refreshes)} refreshes of {refreshed} ciphertexts; {parameters}, "
        f"security {show_bits(CkksParameters.from_fields(plan.parameters).security_bits)}",
        soft_wrap=True,
    )


@ckks_app.command("serve")
def serve(
    bundle: WorkerBundlePath,
    listen: Annotated[str, typer.Option(help="tcp://127.0.0.1:PORT or unix:///path/to/socket.")],
    threads: Annotated[int | None, typer.Option(min=1, help="How many threads; by default one per core.")] = None,
    events: Annotated[str, EVENTS] = "text",
) -> None:
    """Serve a polynomial plan until interrupted."""
    from hecompile.runtime.ckks.worker import serve as run

    check_events(events)
    run(bundle, listen, threads, ready=lambda address: tell_address(events, address))


@ckks_app.command("infer")
def infer(
    plan: ClientBundlePath,
    worker: Annotated[str, typer.Option(help=f"{WORKER_ADDRESS}.")],
    prompts: Prompts = None,
    prompts_file: PromptsFile = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "--new-tokens", min=1, help=MAX_NEW_TOKENS)] = 1,
) -> None:
    """Write the likeliest next tokens of prompts. All prompts go through the worker together, as many as the plan has slots;
    each new token is one evaluation of the model."""
    answer_under_ckks(plan, worker, gather_prompts(prompts, prompts_file), max_new_tokens)


def answer_under_ckks(plan: Path, worker: str, prompts: Sequence[Prompt], new_tokens: int) -> None:
    """Print the likeliest `new_tokens` next tokens of each prompt; all go through the CKKS worker together.

    Raises InputError and what `hecompile.runtime.ckks.client.CkksSession` raises.
    """
    from hecompile.runtime.ckks.answers import complete
    from hecompile.runtime.ckks.client import CkksSession

    console = message_console()
    with CkksSession(plan, worker) as session, progress_bar(console, quiet=not sys.stderr.isatty()) as bar:
        task = bar.add_task("refreshes", total=new_tokens * len(session.plan.refreshes))
        texts, places = [prompt.text for prompt in prompts], [prompt.where for prompt in prompts]
        answers = complete(session, texts, new_tokens, lambda *_: bar.advance(task), places)
        stats = session.stats
    for number, written in enumerate(answers):
        print_answer(prompts, number, written)
    console.print(
        f"last evaluation: {stats.total_seconds:.0f} s for {counted(len(prompts), 'prompt')}, "
        f"{stats.bytes_up / 1e6:.0f} MB up, {stats.bytes_down / 1e6:.0f} MB down, {stats.refreshed} ciphertexts refreshed",
        soft_wrap=True,
    )
