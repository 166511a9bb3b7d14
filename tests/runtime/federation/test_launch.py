"""Processes of a federation: what is noticed before it begins, and the files around it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from hecompile.errors import FederationError, InputError
from hecompile.models import TINY_LLAMA
from hecompile.runtime.federation.events import FAILED, ROUND, reporting
from hecompile.runtime.federation.launch import Processes, _end_if_an_owner_fails
from hecompile.runtime.federation.owner import owner_ledger
from hecompile.runtime.federation.protocol.channels import Identity
from hecompile.runtime.federation.recipe import load_federation
from hecompile.runtime.federation.roster import read_roster, write_roster
from hecompile.runtime.privacy.accountant import Mechanism
from hecompile.runtime.wire.events import read_event

RECIPE = TINY_LLAMA.parent / "recipes" / "federation.yaml"


def process(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program], text=True)


def test_an_owner_that_gives_up_ends_the_server_and_a_killed_one_does_not() -> None:
    waiting = "import time; time.sleep(60)"
    server, good, killed = process(waiting), process("pass"), process(waiting)
    killed.kill()
    begun = threading.Event()
    watcher = threading.Thread(
        target=_end_if_an_owner_fails, args=(Processes(server, {"good": good, "killed": killed}), begun)
    )
    watcher.start()
    for one in (good, killed):
        one.wait(10)
    watcher.join(0.7)
    assert watcher.is_alive() and server.poll() is None
    begun.set()
    watcher.join(5)
    assert server.poll() is None
    bad = process("raise SystemExit(2)")
    bad.wait(10)
    _end_if_an_owner_fails(Processes(server, {"bad": bad}), threading.Event())
    assert server.wait(10) < 0


def test_what_an_owner_released_is_kept_beside_its_data_whatever_the_federation(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    for out, overrides in (("one", ()), ("two", ("federation.minimum=3",))):
        privacy = "federation.privacy={clip: 1.0, noise_multiplier: 2.0}"
        recipe = load_federation(RECIPE, [privacy, f"training.output_dir={tmp_path / out}", *overrides])
        with owner_ledger(recipe, recipe.owners[0].model_copy(update={"train_file": data})) as ledger:
            assert ledger is not None
            ledger.spend(Mechanism(2.0, 1.0), note="round 1")
            assert ledger.releases == (1 if out == "one" else 2)
    plain = load_federation(RECIPE)
    with owner_ledger(plain, plain.owners[0]) as ledger:
        assert ledger is None
    assert [path.name for path in tmp_path.iterdir() if path.is_file()].count("data.jsonl.rounds.ledger") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_stepz=1", "unknown key training.max_stepz; did you mean training.max_steps?"),
        ("federation.mask=shared", "unknown key federation.mask; did you mean federation.pruning.mask?"),
        ("rounds=1", "unknown key rounds; did you mean federation.rounds?"),
        ("train_file=x", "unknown key train_file; did you mean owners.0.train_file?"),
    ],
)
def test_a_wrong_key_of_a_federation_is_named_with_the_one_that_was_meant(override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_federation(RECIPE, [override])
    assert str(caught.value) == f"recipe {RECIPE}: {message}"


def test_a_wrong_key_of_an_owner_is_named_with_its_place(tmp_path: Path) -> None:
    document = yaml.safe_load(RECIPE.read_text())
    document["owners"][1]["trian_file"] = document["owners"][1].pop("train_file")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(InputError, match=r"unknown key owners.1.trian_file; did you mean owners.1.train_file\?$"):
        load_federation(path)


def test_a_roster_is_read_as_it_was_written(tmp_path: Path) -> None:
    identities = [Identity.generate(name) for name in ("a", "b")]
    write_roster(tmp_path / "roster.json", identities)
    assert read_roster(tmp_path / "roster.json") == {one.name: one.public for one in identities}
    key = identities[0].public.hex()
    twice = f'{{"a": "{key}", "a": "{identities[1].public.hex()}"}}'
    for content in ("[1]", json.dumps({"a": "xyz"}), "", "[" * 100_000, twice, json.dumps({"a": key[2:]})):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(FederationError, match="is no roster"):
            read_roster(tmp_path / "bad.json")
    with pytest.raises(InputError, match=r"rooster\.json does not exist; did you mean .*roster\.json\?$"):
        read_roster(tmp_path / "rooster.json")


def test_people_read_lines_and_programs_events_with_the_reason_of_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"number": 2, "contributed": 3, "opened": 2, "seconds": 1.25}
    for kind in ("text", "json"):
        with pytest.raises(FederationError), reporting(kind) as report:
            report(ROUND, **fields)
            raise FederationError("too few")
    people, *programs = capsys.readouterr().out.splitlines()
    assert people == "round 2: 3 contributed, 2 opened, 1.2 s"
    assert [read_event(line) for line in programs] == [
        {"event": ROUND, **fields}, {"event": FAILED, "reason": "too few"},
    ]  # fmt: skip
    with pytest.raises(InputError, match="text or json, got 'xml'"), reporting("xml"):
        pass
