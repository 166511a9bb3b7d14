"""Show a build in tables and pictures."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from rich.table import Table

from hecompile.bundles.client import ClientBundle
from hecompile.errors import InputError
from hecompile.inspection.linear import (
    circuit_table,
    circuits_without_gradient,
    draw,
    plan_graph,
    predicted_traffic,
    reached_precision,
    totals_table,
)


@pytest.fixture(scope="module")
def bundle(build: Path) -> ClientBundle:
    return ClientBundle.open(build / "client")


def rendered(table: Table) -> str:
    console = Console(width=220, record=True, file=None, quiet=True)
    with console.capture() as capture:
        console.quiet = False
        console.print(table)
    return capture.get()


def test_one_row_per_circuit(bundle: ClientBundle) -> None:
    table = circuit_table(bundle)
    assert table.row_count == 16
    (row,) = [line for line in rendered(table).splitlines() if "layers.1.mlp.down_proj" in line and "forward" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:8] == [
        "model.layers.1.mlp.down_proj", "forward", "48 x 32", "128 x 12", "3", "2", "161 bits", cells[7]
    ]  # fmt: skip
    assert 8.0 <= float(cells[7].removesuffix(" bits")) < 16.0
    assert cells[-2:] == [str(3 * 48), str(2 * 32)]


def test_totals(bundle: ClientBundle) -> None:
    """Per layer: qkv 32 → 64, o 32 → 32, gate and up 32 → 96, down 48 → 32. 3 bytes up, 2 down everywhere. The first
    layer's qkv backward is never called: no adapter stands before it."""
    forward_in, forward_out = 2 * (32 + 32 + 32 + 48), 2 * (64 + 32 + 96 + 32)
    up, down = 3 * (forward_in + forward_out - 64), 2 * (forward_out + forward_in - 32)
    text = rendered(totals_table(bundle))
    assert f"{up} up, {down} down" in text
    assert f"{3 * forward_in} up, {2 * forward_out} down" in text
    assert "161 bits (MATZOV, classical): ring LWE, dimension 1536, q = 2^32" in text
    (weights,) = [line for line in text.splitlines() if "remote weights" in line]
    assert str(2 * (32 * 64 + 32 * 32 + 32 * 96 + 48 * 32)) in weights
    assert "r = 2, alpha = 4, q_proj, v_proj, down_proj" in text


def test_the_precision_that_was_reached_stands_beside_the_one_asked_for(bundle: ClientBundle) -> None:
    low, high = bundle.plan.reached_bits()
    assert 8.0 == bundle.plan.effective_bits <= low <= high
    assert f"{low:.1f} to {high:.1f} effective bits, 8 asked for" in rendered(totals_table(bundle))
    asked = bundle.plan.model_copy(update={"effective_bits": low - 2.0})
    assert f"{low - 2.0:g} asked for; up to {math.floor(10 * low) / 10:g} the plan is the same" in reached_precision(asked)


def test_backward_circuits_that_training_never_calls(bundle: ClientBundle) -> None:
    first = "model.layers.0.self_attn.q_proj-k_proj-v_proj.backward"
    assert circuits_without_gradient(bundle.graph()) == {first}
    every, used = predicted_traffic(bundle.circuits), predicted_traffic(bundle.circuits, frozenset({first}))
    assert (every.bytes_up - used.bytes_up, every.bytes_down - used.bytes_down) == (3 * 64, 2 * 32)
    assert used.total == used.bytes_up + used.bytes_down


def test_graph_of_the_picture(bundle: ClientBundle) -> None:
    graph = plan_graph(bundle.graph())
    worker = sorted(data["label"] for _, data in graph.nodes(data=True) if data["worker"])
    assert len(worker) == 8
    assert worker[0] == "Linear\nlayers.0.mlp.down_proj"
    assert all(len(list(graph.predecessors(vertex))) > 0 for vertex in graph if "\n" in graph.nodes[vertex]["label"])


def test_svg_shows_both_colours(bundle: ClientBundle, tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    draw(bundle, path)
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    text = path.read_text()
    assert "#9ecae1" in text and "#fdae6b" in text


def test_png(bundle: ClientBundle, tmp_path: Path) -> None:
    draw(bundle, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("name", ["plan.pdf", "plan", "plan.svg.txt"])
def test_other_file_types_are_refused(bundle: ClientBundle, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"give a file that ends in \.svg or \.png"):
        draw(bundle, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_does_not_exist_is_refused(bundle: ClientBundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write .*nowhere"):
        draw(bundle, tmp_path / "nowhere" / "plan.svg")
