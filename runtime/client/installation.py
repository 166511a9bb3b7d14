"""Compare the installed packages with what hecompile and its extras require."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet

from hecompile.extras import install_command, packages_of

EXTRAS = {
    "network": "workers over gRPC and Arrow Flight, metrics",
    "privacy": "training with differential privacy",
    "ckks": "polynomial models wholly on a worker",
    "gguf": "checkpoints in GGUF files",
    "trl": "TRL's trainers on an offloaded model",
    "fleet": "fleets of workers on Ray Serve",
    "federation": "federations run by Flower",
    "bench": "other libraries to compare with in benchmarks",
}
"""Each extra that a user may want, and what it is for; `dev` is for those who change hecompile."""


@dataclass(frozen=True)
class Requirements:
    """Hold the range of Python versions, and a line per package as in `ray[serve]<3; extra == "fleet"`."""

    python: str
    packages: tuple[str, ...]

    def python_fits(self, version: str) -> bool:
        """Return whether a version of Python, as in `3.11.7`, is in the range."""
        return SpecifierSet(self.python).contains(version)


@dataclass(frozen=True)
class PackageState:
    """Describe one required package.

    Attributes:
        requirement: name and range of versions, as in `torch<2.14,>=2.13`.
        version: the installed one, None where the package is missing.
        fits: whether that version is in the range.
    """

    requirement: str
    version: str | None
    fits: bool

    def __str__(self) -> str:
        return self.requirement if self.version is None else f"{self.requirement} (installed: {self.version})"


@dataclass(frozen=True)
class ExtraState:
    """Describe one extra: its purpose, what of it is missing, and the command that installs it."""

    name: str
    purpose: str
    missing: tuple[PackageState, ...]
    command: str


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_requirements() -> Requirements | None:
    """Return what the installed hecompile requires, None where it runs from sources that nobody installed."""
    try:
        metadata = importlib.metadata.metadata("hecompile")
    except importlib.metadata.PackageNotFoundError:
        return None
    return Requirements(metadata["Requires-Python"] or "", tuple(metadata.get_all("Requires-Dist") or ()))


def package_states(
    requires: Iterable[str], extra: str = "", version_of: Callable[[str], str | None] = installed_version
) -> tuple[PackageState, ...]:
    """Return the state of each package in `Requirements.packages` that an extra needs, or hecompile itself (extra "")."""
    states = []
    for requirement in packages_of(requires, extra):
        version = version_of(requirement.name)
        shown = f"{requirement.name}{requirement.specifier}"
        states.append(PackageState(shown, version, version is not None and requirement.specifier.contains(version)))
    return tuple(states)


def extra_states(
    requires: Iterable[str], package: Path, version_of: Callable[[str], str | None] = installed_version
) -> tuple[ExtraState, ...]:
    """Return the state of every extra of `EXTRAS`; `package` is the folder that hecompile is imported from."""
    lines = list(requires)
    return tuple(
        ExtraState(
            name,
            purpose,
            tuple(state for state in package_states(lines, name, version_of) if not state.fits),
            install_command(name, package, lines),
        )
        for name, purpose in EXTRAS.items()
    )
