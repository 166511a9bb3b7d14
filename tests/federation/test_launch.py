"""Processes of a federation: what is noticed before it begins, and the files around it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hecompile.errors import FederationError
from runtime.federation.channels import Identity
from runtime.federation.launch import Processes, _end_if_an_owner_fails, read_roster, write_roster


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


def test_a_roster_is_read_as_it_was_written(tmp_path: Path) -> None:
    identities = [Identity.generate(name) for name in ("a", "b")]
    write_roster(tmp_path / "roster.json", identities)
    assert read_roster(tmp_path / "roster.json") == {one.name: one.public for one in identities}
    for content in ("[1]", json.dumps({"a": "xyz"}), ""):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(FederationError, match="is no roster"):
            read_roster(tmp_path / "bad.json")
