"""The Flower apps, with a grid that hands messages over in this process. Skipped where flwr is not installed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

flwr_app = pytest.importorskip("flwr.app")

from hecompile.models import TINY_LLAMA  # noqa: E402
from hecompile.runtime.federation.flower import client_app, main  # noqa: E402
from hecompile.runtime.federation.records import read_records  # noqa: E402
from hecompile.runtime.federation.roster import own_identity, write_roster  # noqa: E402

RECIPE = TINY_LLAMA.parent / "recipes" / "federation.yaml"
NODES = {11: 0, 22: 1, 33: 2}


class LocalGrid:
    """Nodes of a simulation; `broken` ones answer with an error."""

    def __init__(self, run_config: dict[str, Any]) -> None:
        self.run_config = run_config
        self.broken: set[int] = set()
        self.states = {node: flwr_app.RecordDict() for node in NODES}

    def get_node_ids(self) -> Iterable[int]:
        return list(NODES)

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> Iterable[Any]:
        for message in messages:
            node = message.metadata.dst_node_id
            if node in self.broken and message.metadata.message_type != "query.hello":
                yield flwr_app.Message(flwr_app.Error(code=1, reason="gone"), reply_to=message)
                continue
            context = flwr_app.Context(
                run_id=1, node_id=node, node_config={"partition-id": NODES[node]}, state=self.states[node],
                run_config=self.run_config,
            )  # fmt: skip
            yield client_app(message, context)


def test_a_round_over_flower_goes_on_without_a_node_and_keeps_no_secret_in_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity  # what Flower sets in its processes
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(identity, name, 1)
    overrides = f"federation.rounds=1 training.max_steps=1 training.output_dir={tmp_path / 'out'}"
    names = ["owner-1", "owner-2", "owner-3"]
    keys, roster = tmp_path / "keys", tmp_path / "roster.json"
    write_roster(roster, [own_identity(name, keys / name) for name in names])
    run_config = {"recipe": str(RECIPE), "roster": str(roster), "keys": str(keys), "overrides": overrides}
    grid = LocalGrid(run_config)
    grid.broken.add(33)
    context = flwr_app.Context(run_id=1, node_id=0, node_config={}, state=flwr_app.RecordDict(), run_config=run_config)
    main(grid, context)  # type: ignore[arg-type]
    (record,) = read_records(tmp_path / "out")
    assert list(record.contributors) == ["owner-1", "owner-2"]
    assert all(len(state) == 0 for state in grid.states.values())
    written = {path.name for path in tmp_path.rglob("rounds/*")}
    assert written == {"lock", "record.json"}
    adapters = {path.read_bytes() for path in tmp_path.rglob("adapter_model.safetensors")}
    assert len(adapters) == 1
