"""Write the page of results: machine and versions in its header, a stored piece of Markdown per section, plots beside it."""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import transformers

from benchmarks import SECTIONS
from benchmarks.timing import describe_threads
from hecompile.errors import HecompileError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
PAGE = "README.md"
_RESULTS = "HECOMPILE_BENCHMARK_RESULTS"
_PACKAGES = ("torch", "numpy", "numba", "onnxruntime", "transformers", "peft")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")


def results_directory() -> Path:
    """Return where results go: benchmarks/results, build/quick-benchmarks if quick, or $HECOMPILE_BENCHMARK_RESULTS."""
    return Path(os.environ.get(_RESULTS, ROOT / "benchmarks" / "results"))


def use_quick_directory() -> None:
    """Send this process's results, and those of its children, where they do not take the place of real ones."""
    os.environ.setdefault(_RESULTS, str(ROOT / "build" / "quick-benchmarks"))


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a Markdown table: the first column left-aligned, the others right-aligned, floats to three digits."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "|".join(["---"] + ["---:"] * (len(headings) - 1)) + "|"]
    for row in rows:
        if len(row) != len(headings):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(headings)}")
        lines.append("| " + " | ".join(_cell(value) for value in row) + " |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def save_plot(figure: Figure, name: str, caption: str) -> str:
    """Save `<name>.svg` beside the page and return the Markdown that shows it."""
    import matplotlib.pyplot as plt

    directory = results_directory()
    directory.mkdir(parents=True, exist_ok=True)
    # Without a date, and with ids that do not change, the same figures give the same file.
    with plt.rc_context({"svg.hashsalt": name}):
        figure.savefig(directory / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return f"![{caption}]({name}.svg)"


def new_figure(title: str, x: str, y: str, size: tuple[float, float] = (6.4, 3.6)) -> tuple[Figure, Axes]:
    """Make a figure with one pair of labelled axes and a light grid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=size)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def machine() -> dict[str, str]:
    """Describe the machine and the versions, as the page's header shows them."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    values = {line.split(":")[0].strip(): line.split(":")[-1].strip() for line in info.splitlines() if ":" in line}
    flags = set(values.get("flags", "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    family = f"family {values.get('cpu family', '?')}, model {values.get('model', '?')}"
    return {
        "CPU": f"{values.get('model name', platform.processor())} ({family})",
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.1f} GiB",
        "instructions": ", ".join(flag for flag in _FLAGS if flag in flags) or "none of " + ", ".join(_FLAGS),
        "threads": describe_threads(),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def commit() -> str:
    """Return the short git commit, with a mark where tracked files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with local changes" if changed else "")


def store_section(name: str, run: ModuleType, quick: bool) -> Path:
    """Run a section, store its Markdown with where it comes from, and assemble the page again."""
    transformers.utils.logging.disable_progress_bar()
    if quick:
        use_quick_directory()
    load = os.getloadavg()[0]
    body = run.run(quick)
    where = machine()
    provenance = (
        f"`python -m benchmarks{' --quick' if quick else ''} {name}` at commit {commit()}, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; {where['CPU']}, {where['cores']} cores, torch "
        f"{_version('torch')}; load average at the start {load:.1f}."
    )
    if quick:
        provenance += " **Quick run: a check that the code works; its figures mean nothing.**"
    directory = results_directory()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.md"
    path.write_text(f"{body.strip()}\n\n{provenance}\n", encoding="utf-8")
    assemble()
    return path


def assemble() -> Path:
    """Write the page from the header and the stored sections, in the order of `SECTIONS`."""
    directory = results_directory()
    directory.mkdir(parents=True, exist_ok=True)
    header = [f"| {what} | {value} |" for what, value in machine().items()]
    parts = [
        "# Benchmark results",
        "Written by `make bench` (`python -m benchmarks`); do not edit. Each section says by which command and at which "
        "commit it was measured. Times are medians of interleaved runs, wall seconds unless CPU seconds are named; "
        "MB = 10^6 bytes.",
        "\n".join(["| | |", "|---|---|", *header, f"| commit | {commit()} |"]),
    ]
    for name in SECTIONS:
        stored = directory / f"{name}.md"
        if stored.is_file():
            parts.append(stored.read_text(encoding="utf-8").strip())
    page = directory / PAGE
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def section_main(name: str) -> None:
    """Run a section in this process, store and print its Markdown; `--quick` is read from the command line."""
    module = importlib.import_module(SECTIONS[name])
    parser = argparse.ArgumentParser(description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to check that the code works")
    quick = parser.parse_args().quick
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # an exception, so that the processes of a section end with it
    try:
        print(store_section(name, module, quick).read_text(encoding="utf-8"))
    except HecompileError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_section_process(name: str, quick: bool) -> bool:
    """Run one section in a process of its own; return whether it succeeded. A failure leaves its earlier result."""
    program = f"from benchmarks.report import section_main; section_main({name!r})"
    command = [sys.executable, "-c", program, *(["--quick"] if quick else [])]
    environment = {"TOKENIZERS_PARALLELISM": "false", **os.environ}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0
