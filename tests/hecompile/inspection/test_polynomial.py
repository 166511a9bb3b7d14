"""Show approximations and modules once per kind, with ranges over the layers, or one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from hecompile.errors import InputError
from hecompile.graph.ir import DOMAIN, attributes_of, module_path
from hecompile.inspection.polynomial import approximation_table, modules_of, polynomial_file
from hecompile.inspection.rows import named_rows
from tests.hecompile.compiler.test_polynomial_plan import POWER, approximated
from tests.support.tiny import exported


def rendered(table: RenderableType | None) -> str:
    assert table is not None
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    assert max(map(len, capture.get().splitlines())) <= 80
    return capture.get()


def test_approximations_are_shown_once_per_kind_with_the_widest_domain() -> None:
    model = approximated(POWER)
    lines = rendered(approximation_table(model)).splitlines()
    row = lines[lines.index(" model.layers.*.mlp.act_fn × 2: PolynomialSiLU") + 1]
    nodes = [node for node in model.graph if node.domain == DOMAIN and module_path(node).endswith("act_fn")]
    lower, upper = (
        choose(attributes_of(node)[f"domain_{end}"] for node in nodes)
        for choose, end in ((min, "lower"), (max, "upper"))
    )
    assert len(nodes) == 2 and f"x {lower:.3g} … {upper:.3g}" in row
    errors = sorted(attributes_of(node)["error_bound"] for node in nodes)
    assert row.endswith(f"{errors[0]:.2e}–{errors[1]:.2e}") or f"{errors[0]:.2e}" == f"{errors[1]:.2e}"
    assert " model.norm: PolynomialRMSNorm" in lines  # which stands once
    every = rendered(approximation_table(model, layers=True)).splitlines()
    assert {f" model.layers.{layer}.mlp.act_fn: PolynomialSiLU" for layer in (0, 1)} <= set(every) and not any(
        "×" in line for line in every
    )


def test_nothing_is_shown_where_nothing_is_approximated() -> None:
    assert approximation_table(exported()) is None and modules_of(exported())["model.norm"].refreshed == ()


def test_names_are_whole_at_any_width() -> None:
    name = "model.layers.*." + "a" * 60
    text = rendered(named_rows("title", ("", "one\nnumber"), [(name, [["forward", "1"], ["backward", "200"]])]))
    assert text.splitlines() == [
        " title",
        "                 one",
        "              number",
        " " + "─" * len(name),
        f" {name}",
        "   forward         1",
        "   backward      200",
        "",
    ]


def test_an_empty_file_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(InputError, match=r"empty\.onnx holds no graph"):
        polynomial_file(tmp_path / "empty.onnx")
