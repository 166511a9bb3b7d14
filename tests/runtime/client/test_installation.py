"""Compare what `hecompile doctor` says of packages and extras with metadata and pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from hecompile.extras import install_command
from hecompile.runtime.client.installation import (
    EXTRAS,
    PackageState,
    Requirements,
    extra_states,
    package_states,
    read_requirements,
)
from tests.conftest import ROOT

LINES = (
    "alpha<3,>=2", "beta", 'gamma; python_version < "3"', 'ray[serve]<2.61,>=2.60; extra == "fleet"',
    'tenseal>=0.3; extra == "ckks"', 'hecompile[ckks]; extra == "dev"',
)  # fmt: skip
INSTALLED = {"alpha": "3.1", "beta": "1", "tenseal": "0.3.16"}


def test_needed_packages_are_those_of_no_extra_on_this_python() -> None:
    assert package_states(LINES, version_of=INSTALLED.get) == (
        PackageState("alpha<3,>=2", "3.1", False),
        PackageState("beta", "1", True),
    )
    assert str(package_states(LINES, version_of=INSTALLED.get)[0]) == "alpha<3,>=2 (installed: 3.1)"


def test_an_extra_is_missing_with_the_command_that_brings_it(tmp_path: Path) -> None:
    states = {state.name: state for state in extra_states(LINES, tmp_path / "hecompile", INSTALLED.get)}
    assert states["ckks"].missing == ()
    assert states["fleet"].missing == (PackageState("ray<2.61,>=2.60", None, False),)
    assert states["fleet"].command == "pip install 'ray[serve]<2.61,>=2.60'"


def test_a_checkout_is_installed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert install_command("ckks", ROOT / "hecompile") == install_command("ckks") == "pip install -e '.[ckks]'"
    monkeypatch.chdir(tmp_path)
    assert install_command("ckks") == f"pip install -e '{ROOT.resolve()}[ckks]'"


def test_no_page_and_no_message_installs_hecompile_from_an_index() -> None:
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    texts += [path for room in ("hecompile", "passes", "runtime", "models") for path in (ROOT / room).rglob("*.py")]
    assert [path for path in texts if re.search(r"pip install '?hecompile\b", path.read_text(encoding="utf-8"))] == []


def test_every_extra_is_described() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert EXTRAS.keys() == project["optional-dependencies"].keys() - {"dev"}


@pytest.mark.parametrize(
    ("version", "fits"), [("3.11.0", True), ("3.11.9", True), ("3.12.0", False), ("3.10.1", False)]
)
def test_the_range_of_python(version: str, fits: bool) -> None:
    assert Requirements(">=3.11,<3.12", ()).python_fits(version) is fits


def test_what_is_installed_has_all_that_is_needed() -> None:
    required = read_requirements()
    assert required is not None and required.python
    states = package_states(required.packages)
    assert any(state.requirement.startswith("torch") for state in states)
    assert [str(state) for state in states if not state.fits] == []
