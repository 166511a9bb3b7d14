"""Run `hecompile infer`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hecompile.cli.groups import options_given, with_groups
from hecompile.cli.options import (
    MAX_NEW_TOKENS,
    ON_BAD_WORKER,
    WORKER_ADDRESS,
    AdapterPath,
    ClientBundlePath,
    CredentialOptions,
)
from hecompile.cli.prompts import Prompts, PromptsFile, gather_prompts, print_answer
from hecompile.errors import InputError
from hecompile.terminal import counted, message_console, progress_bar

if TYPE_CHECKING:  # imported when a command runs: help is to be quick
    from hecompile.runtime.inference.answers import Prompt, Reply
    from hecompile.runtime.recipes.workplace import Workplace


@dataclass(frozen=True)
class WorkerOptions:
    """Hold who multiplies, and what is done about workers that do not answer or answer wrongly."""

    panel = "Worker"
    worker: Annotated[list[str] | None, typer.Option(help=f"{WORKER_ADDRESS}; several times for several workers.")] = (
        None
    )
    worker_bundle: Annotated[
        Path | None,
        typer.Option(help="Instead of --worker: run this worker bundle (OUT/worker) in this process."),
    ] = None
    engine: Annotated[str | None, typer.Option(help="With --worker-bundle: its engine.")] = None
    reply_timeout: Annotated[float, typer.Option(help="Seconds of silence after which a request counts as lost.")] = (
        600.0
    )
    attempts: Annotated[int, typer.Option(help="How often a request is sent at most.")] = 6
    on_bad_worker: Annotated[str, typer.Option(help=ON_BAD_WORKER)] = "stop"

    def workplace(self, plan: Path, credentials: CredentialOptions) -> Workplace:
        """Return where the plan runs. Raises InputError naming the option that is wrong."""
        from hecompile.runtime.recipes.workplace import make_workplace

        addresses = self.worker or ["inprocess"]
        connection: dict[str, Any] = asdict(credentials)
        for name in ("on_bad_worker", "reply_timeout", "attempts"):
            connection[name] = getattr(self, name)
        settings: dict[str, Any] = {"model": plan, "worker_bundle": self.worker_bundle, "engine": self.engine}
        settings["worker"] = addresses[0] if len(addresses) == 1 else addresses
        return make_workplace(settings | {"connection": connection})


@dataclass(frozen=True)
class AnswerOptions:
    """Hold which model answers, how it draws tokens and where the answers go."""

    panel = "Answers"
    adapter: AdapterPath = None
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write JSONL to this new file instead of answers to the screen; the same command goes on if interrupted."
        ),
    ] = None
    max_new_tokens: Annotated[int, typer.Option(min=1, help=MAX_NEW_TOKENS)] = 64
    temperature: Annotated[float, typer.Option(help="0: always the most likely token; else how freely to draw.")] = 0.0
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens with this much probability.")] = 1.0
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0


@with_groups
def infer(
    plan: ClientBundlePath,
    answers: AnswerOptions,
    workers: WorkerOptions,
    credentials: CredentialOptions,
    prompts: Prompts = None,
    prompts_file: PromptsFile = None,
) -> None:
    """Answer prompts through the encrypted worker: it sees ciphertexts, as in training; the text stays here.

    With the client bundle of `hecompile ckks export` the whole model is evaluated on the worker, for all prompts at once.
    """
    from hecompile.bundles.ckks import is_polynomial_plan
    from hecompile.cli.ckks import answer_under_ckks

    polynomial = is_polynomial_plan(plan)
    if polynomial:
        _require_what_ckks_takes(plan, answers, workers, credentials)
    elif bool(workers.worker) == (workers.worker_bundle is not None):
        raise InputError(
            "give --worker or --worker-bundle, not both"
            if workers.worker
            else "name who multiplies: --worker, an address, or --worker-bundle to run a worker in this process"
        )
    asked = gather_prompts(prompts, prompts_file)
    if polynomial:
        assert workers.worker is not None
        answer_under_ckks(plan, workers.worker[0], asked, answers.max_new_tokens)
    else:
        _answer(workers.workplace(plan, credentials), asked, answers)


def _require_what_ckks_takes(
    plan: Path, answers: AnswerOptions, workers: WorkerOptions, credentials: CredentialOptions
) -> None:
    """Raise InputError for options that a polynomial plan has no use for, and unless there is one worker."""
    useless = [
        *options_given(answers, "adapter", "out", "temperature", "top_p"),
        *options_given(workers, "worker_bundle", "engine"),
        *options_given(credentials),
    ]
    if useless or workers.worker is None or len(workers.worker) != 1:
        raise InputError(
            f"{plan} is a polynomial plan: give one --worker, where `hecompile ckks serve` listens"
            + (f", and leave out {', '.join(useless)}" if useless else "")
            + "; an adapter is merged by `hecompile ckks export --adapter`"
        )


def _answer(place: Workplace, prompts: Sequence[Prompt], options: AnswerOptions) -> None:
    """Print or write the answers to `prompts`, then a line about matches, time and bytes."""
    from rich.markup import escape

    from hecompile.runtime.inference.generation import Sampling
    from hecompile.runtime.inference.run import run_inference

    console = message_console()
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    with progress_bar(console, quiet=not sys.stderr.isatty()) as bar:
        task = bar.add_task("answers", total=len(prompts))

        def show(number: int, reply: Reply) -> None:
            bar.advance(task)
            if options.out is None:
                print_answer(prompts, number, reply.answer)

        result = run_inference(place, options.adapter, prompts, options.max_new_tokens, sampling, options.out, show)
    if result.compared:
        console.print(f"exact match: {result.matches} of {result.compared} ({result.matches / result.compared:.1%})")
    console.print(
        f"{counted(result.tokens, 'token')} in {result.seconds:.1f} s; {result.bytes_per_token / 1e3:.0f} kB on the wire "
        "per token computed" + ("" if options.out is None else f"; answers: {escape(str(options.out))}"),
        soft_wrap=True,
    )
