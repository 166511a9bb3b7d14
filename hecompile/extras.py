"""Say how an extra of hecompile is installed where it runs: hecompile itself is on no package index."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement


def packages_of(requires: Iterable[str], extra: str) -> Iterator[Requirement]:
    """Yield what an extra needs besides hecompile itself, or what hecompile needs where `extra` is "".

    requires: lines of the metadata, as in `ray[serve]<3; extra == "fleet"`.
    """
    for requirement in map(Requirement, requires):
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if always if extra == "" else not always and requirement.marker.evaluate({"extra": extra}):  # type: ignore[union-attr]
            yield requirement


def install_command(extra: str, package: Path | None = None, requires: Iterable[str] | None = None) -> str:
    """Return the command that installs an extra here: from the checkout, or without one the packages by name.

    package, requires: the folder that hecompile is imported from, and its metadata; by default those of this process.
    """
    checkout = (package or Path(__file__).parent).resolve().parent
    if (checkout / "pyproject.toml").is_file():
        place = "." if checkout == Path.cwd().resolve() else str(checkout)
        return f"pip install -e '{place}[{extra}]'"
    if requires is None:
        requires = importlib.metadata.requires("hecompile") or ()
    return "pip install " + " ".join(f"'{_without_marker(one)}'" for one in packages_of(requires, extra))


def _without_marker(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"
