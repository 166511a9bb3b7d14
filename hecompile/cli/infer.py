"""`hecompile infer`: answers to private prompts by the plan and, if there is one, the adapter."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import typer


def infer(
    plan: Annotated[Path, typer.Argument(help="The client bundle (build/client).")],
    prompts: Annotated[Optional[list[str]], typer.Argument(help="Prompts, each in quotes.")] = None,  # noqa: UP045
    worker: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Where a worker listens, as in a recipe; several times for several workers."),
    ] = None,
    worker_bundle: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Instead of --worker: run this worker bundle (build/worker) in this process."),
    ] = None,
    engine: Annotated[Optional[str], typer.Option(help="With --worker-bundle: its engine.")] = None,  # noqa: UP045
    adapter: Annotated[Optional[Path], typer.Option(help="A PEFT adapter, e.g. runs/demo/adapter.")] = None,  # noqa: UP045
    prompts_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="One prompt per line, or a .jsonl file of objects with prompt (and completion, which the answer is then "
            "compared with). - reads lines from standard input."
        ),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Write JSONL there instead of answers to the screen; the same command goes on if interrupted."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token; else how freely to draw.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens with this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    authority: Annotated[Optional[Path], typer.Option(help="PEM of who signed the worker's certificate.")] = None,  # noqa: UP045
    certificate: Annotated[Optional[Path], typer.Option(help="PEM that this client shows.")] = None,  # noqa: UP045
    key: Annotated[Optional[Path], typer.Option(help="PEM of its key.")] = None,  # noqa: UP045
    token: Annotated[Optional[Path], typer.Option(help="A file with the bearer token.")] = None,  # noqa: UP045
    reply_timeout: Annotated[float, typer.Option(help="Seconds of silence after which a request counts as lost.")] = 600.0,
    attempts: Annotated[int, typer.Option(help="How often a request is sent at most.")] = 6,
    on_bad_worker: Annotated[str, typer.Option(help="After a wrong reply: stop, or retry-elsewhere.")] = "stop",
) -> None:
    """Answer prompts through the encrypted worker: it sees ciphertexts, as in training; the text stays here.

    With the client bundle of `hecompile ckks export` the whole model is evaluated on the worker, for all prompts at once.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from hecompile.bundles.ckks import is_polynomial_plan
    from hecompile.cli.ckks import answer as answer_polynomial
    from hecompile.errors import InputError
    from hecompile.runtime.client.session import open_session
    from hecompile.runtime.inference.answers import Prompt, Reply, read_prompts
    from hecompile.runtime.inference.answers import infer as answer
    from hecompile.runtime.inference.generation import Sampling
    from hecompile.runtime.model.adapter import load_adapter
    from hecompile.runtime.recipes.workplace import make_workplace

    polynomial = is_polynomial_plan(plan)
    others = {
        "--adapter": adapter, "--out": out, "--worker-bundle": worker_bundle, "--engine": engine, "--authority": authority,
        "--certificate": certificate, "--key": key, "--token": token, "--temperature": temperature or None,
        "--top-p": None if top_p == 1 else top_p,
    }  # fmt: skip
    given = [name for name, value in others.items() if value is not None]
    if polynomial and (given or worker is None or len(worker) != 1):
        raise InputError(
            f"{plan} is a polynomial plan: give one --worker, where `hecompile ckks serve` listens, and leave out "
            f"{', '.join(given or others)}; an adapter is merged by `hecompile ckks export --adapter`"
        )
    if not polynomial and not worker and worker_bundle is None:
        raise InputError("name who multiplies: --worker, an address, or --worker-bundle to run a worker in this process")
    if worker and worker_bundle is not None:
        raise InputError("give --worker or --worker-bundle, not both")
    if bool(prompts) == (prompts_file is not None):
        raise InputError("give prompts as arguments or in --prompts-file, one or the other")
    if prompts_file is None:
        asked = [Prompt(text) for text in prompts or ()]
    elif str(prompts_file) == "-":
        asked = [Prompt(line.rstrip("\r\n")) for line in sys.stdin if line.strip()]
    else:
        asked = read_prompts(prompts_file)
    if not asked:
        raise InputError("standard input holds no prompt; give one per line")
    if polynomial:
        assert worker is not None
        answer_polynomial(plan, worker[0], [prompt.text for prompt in asked], max_new_tokens)
        return
    settings: dict[str, Any] = {"model": plan, "worker_bundle": worker_bundle, "engine": engine}
    settings["worker"] = (worker[0] if len(worker) == 1 else worker) if worker else "inprocess"
    settings["connection"] = {
        "authority": authority, "certificate": certificate, "key": key, "token": token, "on_bad_worker": on_bad_worker,
        "reply_timeout": reply_timeout, "attempts": attempts,
    }  # fmt: skip
    place, sampling = make_workplace(settings), Sampling(temperature, top_p, seed)
    console = Console(stderr=True)
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with open_session(place) as session, Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        if adapter is not None:
            load_adapter(session.model, adapter)
        task = bar.add_task("answers", total=len(asked))

        def show(number: int, reply: Reply) -> None:
            bar.advance(task)
            if out is None:
                print(f"{asked[number].text}\t{reply.answer}" if len(asked) > 1 else reply.answer, flush=True)

        started = time.perf_counter()
        try:
            replies = answer(session, asked, max_new_tokens, sampling, out, show)
        except KeyboardInterrupt:
            if out is None:
                raise
            raise KeyboardInterrupt("the answers that are there are kept: the same command goes on from them") from None
        seconds, stats = time.perf_counter() - started, session.model.stats()
    matches = [reply.match for reply in replies if reply.match is not None]
    if matches:
        console.print(f"exact match: {sum(matches)} of {len(matches)} ({sum(matches) / len(matches):.1%})")
    written = sum(reply.tokens for reply in replies)
    kilobytes = (stats["bytes_up"] + stats["bytes_down"]) / max(1.0, stats["tokens"]) / 1e3
    console.print(
        f"{written} tokens in {seconds:.1f} s; {kilobytes:.0f} kB on the wire per token computed"
        + ("" if out is None else f"; answers: {escape(str(out))}"),
        soft_wrap=True,
    )
