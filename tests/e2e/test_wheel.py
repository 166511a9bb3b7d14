"""Hold that a wheel puts one name into site-packages and that `hecompile demo` runs from it in any directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import hecompile
from tests.conftest import ROOT

# A hecompile on PYTHONPATH would come before the environment's, and pip would take it for the wheel's.
VARIABLES = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
SHIPPED = {
    "models/tiny-llama/model.safetensors", "models/recipes/demo.yaml", "models/private/train.jsonl",
    "models/private/heldout.jsonl", "models/private/owners/owner-1.train.jsonl", "models/reduced-llama/config.json",
    "models/reduced-llama-polynomial/model.safetensors", "models/reduced-text/public-train.jsonl",
}  # fmt: skip


def run(command: list[str], where: Path) -> str:
    """Run a command in a directory and return its standard output."""
    done = subprocess.run(command, cwd=where, env=VARIABLES, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel, offline, from a copy of what git lists: nothing that an earlier build left can be in it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name, follow_symlinks=False)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(out)]
    run([sys.executable, "-m", "pip", "wheel", *options, str(source)], source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a virtual environment with the wheel in it, which finds its dependencies where this process has them.

    A plain path in a .pth file comes after the environment's own folder, and the .pth files there are not read: the
    editable install that this process may run from stays out.
    """
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(directory / "bin" / "python")]
    run([*pip, "install", "--no-deps", "--no-index", str(wheel)], directory)
    (packages,) = directory.glob("lib/python3*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return directory


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Make a working directory whose own packages have the names of the folders at the top of the repository."""
    for name in ("models", "passes", "runtime"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise AssertionError('{name} of the user was imported')\n")
    return tmp_path


def modules(package: Path) -> set[str]:
    """Return the Python files of a package, relative to it, through the links in it."""
    walked = ((Path(folder), names) for folder, _, names in os.walk(package, followlinks=True))
    return {
        str((folder / name).relative_to(package)) for folder, names in walked for name in names if name.endswith(".py")
    }


def test_the_wheel_has_one_name_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    version = hecompile.__version__
    assert {name.split("/")[0] for name in names} == {"hecompile", f"hecompile-{version}.dist-info"}
    files = {name.removeprefix("hecompile/") for name in names if name.startswith("hecompile/")}
    assert files >= SHIPPED
    assert {name for name in files if name.endswith(".py")} == modules(ROOT / "hecompile")
    data = {name for name in files if not name.endswith(".py")}
    assert {name.split("/")[0] for name in data} == {"models", "__init__.pyi"}
    assert {Path(name).suffix for name in data} == {".pyi", ".json", ".jsonl", ".safetensors", ".yaml"}


def test_the_package_is_the_wheels_whatever_lies_in_the_working_directory(environment: Path, elsewhere: Path) -> None:
    program = "import hecompile, hecompile.models, hecompile.passes, hecompile.runtime; print(hecompile.__file__)"
    imported = Path(run([f"{environment}/bin/python", "-c", program], elsewhere).strip())
    assert imported.is_relative_to(environment)
    assert run([f"{environment}/bin/hecompile", "--version"], elsewhere) == f"hecompile {hecompile.__version__}\n"


def test_the_demo_runs_from_the_wheel(environment: Path, elsewhere: Path) -> None:
    printed = run([f"{environment}/bin/hecompile", "demo", "training.max_steps=2"], elsewhere)
    assert "training loss of the encrypted run over 2 steps: within 1 %" in printed
    out = elsewhere / "runs" / "make-demo"
    assert (out / "build" / "client" / "plan.onnx").is_file()
    assert (out / "runs" / "encrypted" / "adapter" / "adapter_model.safetensors").is_file()
    assert {path.name for path in elsewhere.iterdir()} == {"models", "passes", "runtime", "runs"}
