"""Run `hecompile doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hecompile.cli.groups import with_groups
from hecompile.cli.options import WORKER_ADDRESS, CredentialOptions
from hecompile.errors import InputError
from hecompile.terminal import message_console, wide_console

if TYPE_CHECKING:  # imported when a command runs: help is to be quick
    from rich.console import Console
    from rich.table import Table

    from hecompile.runtime.client.doctor import Diagnosis
    from hecompile.runtime.client.installation import ExtraState
    from hecompile.runtime.client.machine import EngineState


@with_groups
def doctor(
    credentials: CredentialOptions,
    worker: Annotated[
        str | None,
        typer.Argument(help=f"{WORKER_ADDRESS}, but no fleet's directory. Without it this machine is checked."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="The client bundle (OUT/client) whose plan the worker serves.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per step to predict for.")] = 512,
) -> None:
    """Check this machine: packages, processor, memory, engines, extras. The exit status is 1 where something is missing that
    every use of hecompile needs.

    With a worker's address say what to expect of it before training: protocol, exactness, link speed, predicted seconds per
    step.
    """
    if worker is not None:
        if plan is None:
            raise InputError("give --plan, the client bundle (OUT/client) whose plan the worker serves")
        _check_worker(worker, plan, tokens, credentials)
    elif plan is not None:
        raise InputError("--plan is for the check of a worker: give the worker's address too")
    else:
        _check_machine()


def _check_worker(worker: str, plan: Path, tokens: int, credentials: CredentialOptions) -> None:
    from hecompile.bundles.client import ClientBundle
    from hecompile.runtime.client.doctor import diagnose
    from hecompile.runtime.transports import connect_for
    from hecompile.runtime.transports.directory import fetch_workers
    from hecompile.runtime.wire.address import DIRECTORY_SCHEMES

    shown = credentials.load()
    if worker.startswith(DIRECTORY_SCHEMES):
        listed = ", ".join(fetch_workers(worker, shown)) or "it lists none"
        raise InputError(f"{worker} is a fleet's directory, and one worker is checked at a time; give its address: {listed}")
    bundle = ClientBundle.open(plan)
    pool = connect_for(worker, 1, shown)
    console = wide_console()
    try:
        with console.status("asking the worker"):
            diagnosis = diagnose(bundle, pool, tokens)
    finally:
        pool.close()
    console.print(_diagnosis_table(f"{worker}, plan {bundle.plan_id[:16]}", diagnosis))


def _diagnosis_table(title: str, diagnosis: Diagnosis) -> Table:
    from hecompile.inspection.prediction import megabytes

    def speed(value: float | None) -> str:
        return "too fast to tell" if value is None else f"{megabytes(round(value))}/s"

    return _table(
        title,
        {
            "protocol": f"version {diagnosis.protocol}, engine {diagnosis.engine}",
            "known answers": "exact",
            "round trip": f"{1e3 * diagnosis.round_trip:.2f} ms",
            "link up, down": f"{speed(diagnosis.up)}, {speed(diagnosis.down)}",
            f"a step of {diagnosis.tokens} tokens": f"{megabytes(diagnosis.bytes_step)} up and down",
            "– worker": f"{diagnosis.worker_step:.2f} s",
            "– wire": f"{diagnosis.wire_step:.2f} s",
            "– client cryptography (predicted)": f"{diagnosis.client_step:.2f} s",
            "together, one after the other": f"{diagnosis.step:.2f} s, and the client's own model",
        },
    )


def _check_machine() -> None:
    """Print what this machine has and lacks. Raises typer.Exit with status 1 where something needed is missing."""
    import platform

    import hecompile
    from hecompile.runtime.client import installation

    console, package = wide_console(), Path(hecompile.__file__).parent
    required = installation.read_requirements() or installation.Requirements("", ())
    packages = installation.package_states(required.packages)
    problems = [f"missing or of another version: {state}" for state in packages if not state.fits]
    if not required.packages:
        problems.append(f"hecompile is not installed, only found in {package}: pip install it, or run `make install`")
    if not required.python_fits(platform.python_version()):
        problems.append(f"hecompile runs on Python {required.python}, and this is {platform.python_version()}")
    rows = {
        "hecompile": f"{hecompile.__version__} in {package}",
        "Python": platform.python_version(),
        "packages": f"{sum(state.fits for state in packages)} of {len(packages)} that are needed",
    }
    console.print(_table("installation", rows))
    if all(state.version for state in packages):  # what follows is found out with those packages
        problems += _print_machine_and_engines(console, package)
    if required.packages:
        console.print(_extras_table(installation.extra_states(required.packages, package)))
    for problem in problems:
        message_console().print(f"problem: {problem}", soft_wrap=True, markup=False)
    if problems:
        raise typer.Exit(1)


def _print_machine_and_engines(console: Console, package: Path) -> list[str]:
    """Print two tables and return what keeps hecompile from working."""
    from hecompile.runtime.client import machine

    here, torch, kernels = machine.look_at_machine(Path.cwd()), machine.look_at_torch(), machine.look_at_kernel_cache()
    instructions = ", ".join(name if there else f"no {name}" for name, there in here.instructions.items())
    build = "CPUs" if torch.cuda is None else f"CUDA {torch.cuda}"
    beside = kernels.folder is not None and kernels.folder.is_relative_to(package)
    rows = {
        "processor": f"{here.processor}, {here.cores} cores; {instructions}",
        "torch": f"{torch.version}, built for {build}, {torch.threads} threads",
        "memory": f"{_gigabytes(here.memory)}, of it {_gigabytes(here.memory_available)} available",
        "disk": f"{_gigabytes(here.disk_free)} free in {here.directory}",
        "compiled kernels": f"kept in {'__pycache__ beside their sources' if beside else kernels.folder or 'no place'}",
    }
    console.print(_table("this machine", rows))
    console.print(_engines_table(machine.look_at_engines(), machine.engine_of_auto()))
    if kernels.folder is None:
        return ["compiled kernels can be kept nowhere: set NUMBA_CACHE_DIR to a folder that can be written to"]
    return []


def _engines_table(engines: tuple[EngineState, ...], chosen: str) -> Table:
    rows = {}
    for engine in engines:
        verdict = ("usable" if engine.usable else "not usable") + (f": {engine.note}" if engine.note else "")
        rows[engine.name] = verdict + (", chosen by auto" if engine.name == chosen else "")
    return _table("engines of a worker on this machine", rows)


def _extras_table(extras: tuple[ExtraState, ...]) -> Table:
    rows = {}
    for extra in extras:
        missing = ", ".join(map(str, extra.missing))
        rows[f"{extra.name}: {extra.purpose}"] = f"missing {missing}; {extra.command}" if missing else "installed"
    return _table("extras (what hecompile can do without)", rows)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _table(title: str, rows: dict[str, str]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    return table
