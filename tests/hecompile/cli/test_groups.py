"""Hold that a command takes a dataclass where the command line has its fields as options under a heading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from hecompile.cli.groups import options_given, with_groups


@dataclass(frozen=True)
class Size:
    panel = "How large"
    width_in_cm: Annotated[int, typer.Option(help="Width.")]
    height: Annotated[float | None, typer.Option(help="Height.")] = None


@pytest.fixture
def received() -> list[object]:
    return []


@pytest.fixture
def app(received: list[object]) -> typer.Typer:
    made = typer.Typer()

    @made.command()
    @with_groups
    def draw(size: Size, name: Annotated[str, typer.Argument(help="Name.")] = "x") -> None:
        """Draw it."""
        received.extend([size, name])

    return made


def test_fields_are_options(app: typer.Typer, received: list[object]) -> None:
    result = CliRunner().invoke(app, ["--width-in-cm", "3", "a", "--height", "2.5"])
    assert result.exit_code == 0, result.output
    assert received == [Size(3, 2.5), "a"]


def test_defaults_and_required_options_are_the_fields(app: typer.Typer, received: list[object]) -> None:
    assert CliRunner().invoke(app, []).exit_code == 2
    assert CliRunner().invoke(app, ["--width-in-cm", "3"]).exit_code == 0
    assert received == [Size(3), "x"]


def test_help_has_the_heading(app: typer.Typer) -> None:
    output = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100", "TERM": "dumb"}).output
    assert "How large" in output and "--width-in-cm" in output and "Draw it." in output


def test_options_given_are_those_that_differ_from_their_defaults() -> None:
    assert options_given(Size(3, 1.0)) == ["--width-in-cm", "--height"]
    assert options_given(Size(3), "height") == []
