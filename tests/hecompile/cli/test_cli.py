"""Hold what the command line promises: help that teaches, a quick start, one line and exit status 2 for bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import hecompile
from hecompile.checkpoint.families import LLAMA_LINEARS
from hecompile.cli.export_options import LoraOptions
from hecompile.cli.main import app
from hecompile.errors import HecompileError, InputError
from hecompile.terminal import counted, shown_path
from tests.support.tiny import SEED

HELP = {
    "": ("export", "inspect", "worker", "train", "demo"),
    "export": ("llama",),
    "export llama": (
        "--model", "--out", "--lora-r", "--lora-alpha", "--lora-dropout", "--target-modules", "--precision", "--ring",
        "--batch-size", "--sequence-buckets", "--public-seed", "--placement",
    ),
    "inspect": ("--draw", "--layers", "--json", "build"),
    "worker": ("serve",),
    "worker serve": (
        "--listen", "--engine", "--allow-plaintext-network", "bundle", "--tls-certificate",
        "--tls-key", "--client-authority", "--token-file", "--development-certificates", "grpcs://",
    ),
    "train": ("--resume", "recipe", "key=value"),
    "demo": ("--out", "--precision"),
    "infer": ("--worker", "--prompts-file", "--max-new-tokens", "--authority", "--certificate", "--key", "--token"),
    "ckks infer": ("--worker", "--prompts-file", "--max-new-tokens"),
    "ckks export": ("--sequence-length", "--attention", "--norm", "--activation", "--adapter"),
    "doctor": ("worker", "--plan", "--tokens", "--authority", "--certificate", "--key", "--token"),
    "federate": ("--no-compare", "--resume", "recipe", "key=value"),
    "federation": ("serve", "join", "identities", "identity"),
    "federation serve": ("--roster", "--port", "--resume"),
    "federation join": ("--owner", "--roster", "--keys", "--server", "--resume"),
}  # fmt: skip


@pytest.mark.parametrize("command", HELP)
def test_help_names_every_option(command: str) -> None:
    environment = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    result = CliRunner().invoke(app, [*command.split(), "--help"], env=environment)
    assert result.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert [word for word in HELP[command] if word not in text.lower()] == []


DIFFERENT = {
    "--out", "--worker", "--engine", "--listen", "--roster", "--keys", "--on-bad-worker", "--resume", "--layers", "recipe",
}  # fmt: skip
"""Parameters that take different things in different commands, or have another default there."""


def test_a_parameter_of_several_commands_has_one_help_text() -> None:
    texts: dict[str, set[str | None]] = {}

    def collect(command: Any) -> None:
        for subcommand in getattr(command, "commands", {}).values():
            collect(subcommand)
        for parameter in command.params:
            texts.setdefault(parameter.opts[0], set()).add(parameter.help)

    collect(typer.main.get_command(app))
    assert len(texts) > 50 and not any(None in helps for helps in texts.values())
    assert {name for name, helps in texts.items() if len(helps) > 1} == DIFFERENT


def test_the_version_is_the_packages() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"hecompile {hecompile.__version__}\n")


@pytest.mark.parametrize("arguments", [("--help",), ("export", "llama", "--help"), ("infer", "--help"), ("--version",)])
def test_help_is_quick(arguments: tuple[str, ...]) -> None:
    """Modules that take seconds to import are imported when a command runs."""
    heavy = ("torch", "transformers", "numpy", "numba", "onnx", "onnxruntime")
    program = (
        "import atexit, sys; from hecompile.cli.main import main; "
        f"atexit.register(lambda: print([name for name in {heavy} if name in sys.modules])); main()"
    )
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("line", "wanted"), [("hecompile work", ["worker"]), ("hecompile export llama --lora-a", ["--lora-alpha"])]
)
def test_completion_in_bash_proposes_commands_and_options(line: str, wanted: list[str]) -> None:
    """The variables are those that the script of `--show-completion bash` sets."""
    program = "import sys; sys.argv = ['hecompile']; from hecompile.cli.main import main; main()"
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_HECOMPILE_COMPLETE": "complete_bash"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == wanted


def test_help_says_what_auto_chooses() -> None:
    environment = {"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"}
    text = CliRunner().invoke(app, ["worker", "serve", "--help"], env=environment).output
    chosen = re.search(r"auto \(([^)]*)\)", " ".join(text.split()))
    assert chosen is not None
    order = ["vnni where", "torch where", "else onnxruntime"]
    assert re.findall("|".join(order), chosen[1]) == order


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target-modules", "q_proj,q_porj"), "target module 'q_porj' does not exist"),
        (("--lora-r", "0"), "LoRA r must be at least 1"),
        (("--weight-bits", "7"), "weights can have 8, 9, 10, 11, 12 bits, got 7"),
        (("--ring", "128x8"), "ring '128x8' cannot be selected"),
        (("--sequence-buckets", "8,x"), "--sequence-buckets must be whole numbers"),
        (("--public-seed", "abc"), "seed"),
        (("--placement", "worker"), "--placement must be offload or cheapest, got 'worker'"),
    ],
)
def test_bad_export_options(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    base = ["export", "llama", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*base, *arguments])
    assert isinstance(result.exception, HecompileError)
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers-to-transform", "1,7"), "layer 7 does not exist in this model, or has no target module"),
        (
            ("--layers-to-transform", "0", "--layers-pattern", "blocks"),
            r"layer 0 does not exist in this model under blocks \(layers_pattern\)",
        ),
    ],
)
def test_layers_that_a_model_lacks_are_refused_before_it_is_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("hecompile.cli.export._compile", lambda *a: pytest.fail("the model was read"))
    command = ["export", "llama", "--model", str(checkpoint), "--out", str(tmp_path / "out"), *arguments]
    with pytest.raises(HecompileError, match=message):
        CliRunner().invoke(app, command, catch_exceptions=False)


@pytest.mark.usefixtures("quick_export")
def test_export_then_inspect(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--batch-size", "2", "--sequence-buckets", "8,16", "--public-seed", SEED.hex(), "--precision", "8"]
    exported = CliRunner().invoke(app, ["export", "llama", "--model", str(checkpoint), "--out", str(out), *arguments])
    assert exported.exit_code == 0, exported.output
    assert f"client bundle: {out / 'client'}" in exported.output
    assert re.search(r"\nprecision: \d+\.\d to \d+\.\d effective bits, 8 asked for", exported.output)
    assert re.search(r"\nring \d+ x \d+, security 161 bits \(MATZOV, classical\)", exported.output), exported.output
    assert "\nseconds: " in exported.output  # of the phases that took long enough to be worth it
    assert "704 rows of hints; predicted" in exported.output
    picture = tmp_path / "plan.svg"
    for target in (out, out / "client"):
        shown = CliRunner().invoke(app, ["inspect", str(target), "--draw", str(picture)])
        assert shown.exit_code == 0, shown.output
        assert "161 bits" in shown.output and str(picture) in shown.output
    assert picture.stat().st_size > 1000


def test_a_target_that_cannot_be_used_is_refused_before_anything_is_said(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = CliRunner().invoke(app, ["export", "llama", "--model", str(checkpoint), "--out", str(tmp_path)])
    assert isinstance(result.exception, InputError) and "holds no earlier build" in str(result.exception)
    assert result.output == "" and [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_inspect_of_a_checkpoint_predicts_its_sizes(checkpoint: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(checkpoint)])
    assert shown.exit_code == 0, shown.output
    assert "15 products, 704 rows of hints; predicted" in shown.output
    (row,) = [line for line in shown.output.splitlines() if "512 x 3" in line]
    assert "161 bits" in row and "about 2.6 MB" in row
    found = json.loads(CliRunner().invoke(app, ["inspect", str(checkpoint), "--json"]).output)
    assert (found["what"], found["products"], found["hint_rows"]) == ("prediction", 15, 704)
    assert {ring["ring_dim"]: ring["hint_bytes"] for ring in found["rings"]}[512] == 704 * 1536 * 19 // 8


def test_inspect_draws_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(checkpoint), "--draw", str(tmp_path / "plan.svg")])
    assert isinstance(result.exception, InputError) and "--draw draws a build" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_inspect_of_a_truncated_bundle(build: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(build, tmp_path / "copy"))
    (copy / "client" / "plan.onnx").write_bytes(b"")
    result = CliRunner().invoke(app, ["inspect", str(copy)])
    assert isinstance(result.exception, InputError) and "plan.onnx has 0 bytes" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "llama", "--model", "{tmp}/none", "--out", "{tmp}/out"), "none"),
        (("inspect", "{tmp}"), "is not a client bundle: manifest.json is missing"),
    ],
    ids=["export", "inspect"],
)
def test_bad_input_is_one_line_and_status_2(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    """As a process of its own: no traceback, nothing on standard output but progress, nothing written."""
    command = [sys.executable, "-m", "hecompile.cli", *(part.format(tmp=tmp_path) for part in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert "Traceback" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_path_is_printed_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert str(shown_path(tmp_path / "here" / "models" / ".." / "runs")) == "runs"
    assert shown_path(Path("../runs")) == tmp_path / "runs"
    assert (counted(1, "step"), counted(2, "step")) == ("1 step", "2 steps")


@pytest.mark.parametrize(
    ("text", "layers"), [("8-11", (8, 9, 10, 11)), ("3", (3,)), ("0, 2,4-5", (0, 2, 4, 5)), ("5-3", None), ("x", None)]
)
def test_layers_with_an_adapter(text: str, layers: tuple[int, ...] | None) -> None:
    options = LoraOptions(layers_to_transform=text, layers_pattern="layers")
    if layers is None:
        with pytest.raises(InputError, match=f"--layers-to-transform must be layers counted from 0, .* got '{text}'"):
            options.attach(LLAMA_LINEARS)
        return
    attached = options.attach(LLAMA_LINEARS)
    assert (attached.layers_to_transform, attached.layers_pattern) == (layers, ("layers",))
