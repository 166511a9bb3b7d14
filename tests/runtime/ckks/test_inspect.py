"""`hecompile inspect` of a CKKS bundle: what it shows, that it is what a session then does, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hecompile.bundles.ckks import open_worker
from hecompile.bundles.kinds import CIRCUIT, PLAN, TABLE
from hecompile.ckks.circuit import PolynomialCircuit
from hecompile.cli.main import app
from hecompile.errors import InputError
from hecompile.graph.ir import module_path
from hecompile.inspection.ckks_traffic import predicted_traffic
from hecompile.inspection.kinds import kind_of
from tests.runtime.ckks.support import LEVELS

MLP = "model.layers.0.mlp"


def shown(*arguments: str) -> dict[str, str]:
    """Return what `inspect` says under each heading of its tables of two columns."""
    result = CliRunner().invoke(app, ["inspect", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    rows = [line.strip("│ ").split("│") for line in result.output.splitlines() if line.startswith("│")]
    return {cells[0].strip(): cells[1].strip() for cells in rows}


def test_inspect_shows_what_a_bundle_is(build: Path) -> None:
    plan, circuit, parameters = open_worker(build / "worker")
    predicted = predicted_traffic(circuit, parameters)
    for whole in (shown(str(build), "--layers"), shown(str(build / "worker"), "--layers")):
        assert whole["ring dimension"] == "8192" and whole["slots"].startswith("4096,")
        assert whole["levels"] == f"{LEVELS} of 30 bits" and whole["depth of the graph"].startswith(f"{plan.depth} levels")
        assert whole["modulus"].startswith(f"{math.prod(parameters.moduli).bit_length()} bits")
        assert whole["security"].startswith("130 bits (MATZOV, classical)")
        assert whole["refreshes"] == f"{len(plan.refreshes)} of {predicted.refreshed} ciphertexts"
        assert whole["bytes per evaluation up"].startswith(f"{predicted.bytes_up(parameters)} ")
        assert whole["bytes per evaluation down"].startswith(f"{predicted.bytes_down(parameters)} ")
        assert whole["evaluation keys"].startswith(f"{parameters.evaluation_key_bytes} bytes")
        for name, count in predicted.refreshes.items():
            assert whole[f"refresh of {name.removesuffix('.fresh')}"] == f"{count} ciphertexts"
        assert whole["levels between refreshes"] == str(LEVELS)
    client = shown(str(build / "client"))  # without a circuit: entries that are masked count
    entries = sum(map(math.prod, plan.refreshes.values()))
    assert client["refreshes"] == f"{len(plan.refreshes)} of at most {entries} ciphertexts"
    assert int(client["bytes per evaluation up"].split()[2]) > predicted.bytes_up(parameters)
    folded = shown(str(build))
    counted = [count for name, count in predicted.refreshes.items() if circuit_module(circuit, name) == MLP]
    assert folded[kind_of(MLP)] == f"{counted[0]} ciphertexts" and len(counted) == 1
    nodes = shown(str(build), "--nodes")
    assert nodes["logits"] == "Linear" and {nodes[name] for name in plan.refreshes} == {"Refresh"}


def circuit_module(circuit: PolynomialCircuit, refreshed: str) -> str:
    (node,) = [node for node in circuit.graph if str(node.outputs[0].name) == refreshed]
    return module_path(node)


def test_inspect_as_json(build: Path, tmp_path: Path) -> None:
    plan, circuit, parameters = open_worker(build / "worker")
    traffic = predicted_traffic(circuit, parameters)
    picture = tmp_path / "plan.svg"
    arguments = ["inspect", str(build), "--json", "--draw", str(picture)]
    found = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).output)
    assert (found["format"], found["what"], found["plan_id"]) == ("hecompile-inspect-1", "ckks plan", plan.plan_id)
    assert found["per_evaluation"]["bytes_up"] == traffic.bytes_up(parameters) and found["exact"] is True
    assert {row["value"] + ".fresh": row["ciphertexts"] for row in found["refreshes"]} == traffic.refreshes
    assert found["graph"]["levels"] == LEVELS and found["graph"]["modules"][-1]["module"] == "lm_head"
    assert "decrypt, encrypt" in picture.read_text()
    client = json.loads(CliRunner().invoke(app, ["inspect", str(build / "client"), "--json"]).output)
    assert client["exact"] is False and "graph" not in client


def test_inspect_refuses_a_damaged_bundle(build: Path, tmp_path: Path) -> None:
    def refused(damage: Callable[[Path], object], message: str, *options: str) -> None:
        shutil.rmtree(tmp_path / "build", ignore_errors=True)
        damaged = Path(shutil.copytree(build, tmp_path / "build"))
        damage(damaged)
        with pytest.raises(InputError, match=message):
            CliRunner().invoke(app, ["inspect", str(damaged), *options], catch_exceptions=False)

    def edit(part: str, field: str, value: object) -> Callable[[Path], object]:
        def change(directory: Path) -> None:
            plan = json.loads((directory / part / PLAN).read_text())
            (directory / part / PLAN).write_text(json.dumps(plan | {field: value}))

        return change

    refused(lambda out: (out / "client" / PLAN).unlink(), f"client is no polynomial bundle .no {PLAN}")
    refused(lambda out: shutil.rmtree(out / "worker"), "worker does not exist")
    refused(lambda out: (out / "worker" / CIRCUIT).write_bytes(b"\0"), "is not the circuit of")
    refused(lambda out: (out / "worker" / CIRCUIT).unlink(), "copy the worker bundle again")
    refused(lambda out: (out / "client" / TABLE).write_bytes(b""), f"{TABLE} cannot be read")
    refused(edit("client", "plan_id", "0" * 64), "halves of different plans")
    refused(edit("client", "refreshes", {"v5.fresh": "3"}), "not a plan of this version")
    refused(edit("worker", "format", "hecompile-ckks-0"), "not a plan of this version")
    both = edit("client", "refreshes", {}), edit("worker", "refreshes", {})
    refused(lambda out: [change(out) for change in both], "not those of the circuit")
    refused(lambda out: shutil.move(out / "client", out.with_name("alone")), "client does not exist")
    with pytest.raises(InputError, match="no circuit"):
        CliRunner().invoke(app, ["inspect", str(tmp_path / "alone"), "--nodes"], catch_exceptions=False)
    with pytest.raises(InputError, match="no circuit to draw"):
        CliRunner().invoke(app, ["inspect", str(tmp_path / "alone"), "--draw", "x.svg"], catch_exceptions=False)
