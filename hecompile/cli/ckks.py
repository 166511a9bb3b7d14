"""`hecompile ckks`: a polynomial model evaluated wholly on a worker."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

ckks_app = typer.Typer(
    no_args_is_help=True,
    help="Evaluate a small polynomial model wholly on a worker, under CKKS: the client encrypts inputs, refreshes "
    "ciphertexts where the plan says and decrypts logits. Many independent prompts share the slots.",
)


@ckks_app.command("export")
def export(
    model: Annotated[str, typer.Option(help="Checkpoint, as a rule one made by `hecompile convert`.")],
    out: Annotated[Path, typer.Option(help="Where to write client/ and worker/. An earlier build there is replaced.")],
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of a prompt at most.")],
    adapter: Annotated[Optional[Path], typer.Option(help="A PEFT adapter, merged into the weights.")] = None,  # noqa: UP045
    levels: Annotated[
        int, typer.Option(help="Multiplications between two refreshes: more take a larger ring; 0: no refreshes.")
    ] = 4,
    ring_dim: Annotated[Optional[int], typer.Option(help="By default the smallest that has the levels at 128 bits.")] = None,  # noqa: UP045
    attention: Annotated[Optional[str], typer.Option(help="As for `export llama`.")] = None,  # noqa: UP045
    norm: Annotated[Optional[str], typer.Option(help="As for `export llama`.")] = None,  # noqa: UP045
    activation: Annotated[Optional[str], typer.Option(help="As for `export llama`.")] = None,  # noqa: UP045
    last_only: Annotated[
        bool, typer.Option(help="Logits of the last position alone; prompts then have that many tokens.")
    ] = False,
) -> None:
    """Compile a checkpoint for evaluation on ciphertexts. The worker's half holds the weights, the adapter's included."""
    from rich.console import Console
    from rich.markup import escape

    from hecompile.compiler.ckks import CkksOptions, export_polynomial

    options = CkksOptions(sequence_length, levels, ring_dim, attention, norm, activation, last_only)
    console = Console(stderr=True)
    with console.status("load") as status:
        plan = export_polynomial(model, out, options, adapter, status.update)
    refreshed = sum(math.prod(shape) for shape in plan.refreshes.values())
    parameters = ", ".join(f"{name} {value}" for name, value in plan.parameters.items())
    console.print(
        f"{escape(str(out))}: depth {plan.depth}, {len(plan.refreshes)} refreshes of {refreshed} ciphertexts; {parameters}, "
        "128 bits of security",
        soft_wrap=True,
    )


@ckks_app.command("serve")
def serve(
    bundle: Annotated[Path, typer.Argument(help="The worker's half of the export.")],
    listen: Annotated[str, typer.Option(help="tcp://127.0.0.1:PORT or unix:///path.")],
    threads: Annotated[Optional[int], typer.Option(min=1, help="By default one per core.")] = None,  # noqa: UP045
) -> None:
    """Serve a polynomial plan until interrupted."""
    from hecompile.runtime.ckks.worker import serve as run

    run(bundle, listen, threads)


@ckks_app.command("infer")
def infer(
    plan: Annotated[Path, typer.Argument(help="The client's half of the export.")],
    worker: Annotated[str, typer.Option(help="Where `ckks serve` listens.")],
    prompts: Annotated[Optional[list[str]], typer.Argument(help="Prompts, at most as many as there are slots.")] = None,  # noqa: UP045
    prompts_file: Annotated[Optional[Path], typer.Option(help="One prompt per line.")] = None,  # noqa: UP045
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write; each is one evaluation of the model.")] = 1,
) -> None:
    """Write the likeliest next tokens of prompts; all prompts go through the worker together."""
    from hecompile.errors import InputError
    from hecompile.files import reason_of

    if bool(prompts) == (prompts_file is not None):
        raise InputError("give prompts as arguments or in --prompts-file, one or the other")
    if prompts_file is not None:
        try:
            prompts = [line for line in prompts_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {prompts_file}: {reason_of(error)}") from None
    assert prompts is not None
    answer(plan, worker, prompts, new_tokens)


def answer(plan: Path, worker: str, prompts: Sequence[str], new_tokens: int) -> None:
    """Prints the likeliest `new_tokens` next tokens of each prompt; all go through the CKKS worker together.

    Raises InputError and what `hecompile.runtime.ckks.client.CkksSession` raises.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from hecompile.runtime.ckks.answers import complete
    from hecompile.runtime.ckks.client import CkksSession

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with CkksSession(plan, worker) as session, Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("refreshes", total=new_tokens * len(session.plan.refreshes))
        answers = complete(session, prompts, new_tokens, lambda *_: bar.advance(task))
        stats = session.stats
    for prompt, written in zip(prompts, answers, strict=True):
        print(f"{prompt}\t{written}" if len(prompts) > 1 else written, flush=True)
    console.print(
        f"last evaluation: {stats.total_seconds:.0f} s for {len(prompts)} prompts, {stats.bytes_up / 1e6:.0f} MB up, "
        f"{stats.bytes_down / 1e6:.0f} MB down, {stats.refreshed} ciphertexts refreshed",
        soft_wrap=True,
    )
