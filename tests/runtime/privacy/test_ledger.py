"""Check the ledger: what was spent survives everything, and nothing beyond the budget is let through."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from hecompile.errors import InputError, PrivacyError
from hecompile.runtime.privacy.accountant import Mechanism, affordable, spent_epsilon
from hecompile.runtime.privacy.ledger import PrivacyLedger, Subject

SUBJECT = Subject("ab" * 32, 1000, 1e-4)
STEP = Mechanism(5.0, 0.3)


def test_releases_are_there_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "ledger.jsonl"
    with PrivacyLedger(path, SUBJECT) as ledger:
        assert ledger.releases == 0 and ledger.spent() == 0.0
        ledger.spend(STEP, note="step 1")
        ledger.spend(Mechanism(2.0, 0.5), count=3)
        ledger.spend(STEP)
    with PrivacyLedger(path, SUBJECT) as ledger:
        assert dict(ledger.history) == {STEP: 2, Mechanism(2.0, 0.5): 3}
        assert ledger.spent() == spent_epsilon([(STEP, 2), (Mechanism(2.0, 0.5), 3)], 1e-4) > 0
    assert path.stat().st_mode & 0o077 == 0


def test_a_release_is_on_disk_before_spend_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "ledger", []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (real(file), synced.append(os.fstat(file).st_size)))
    ledger = PrivacyLedger(path, SUBJECT)
    ledger.spend(STEP)
    assert synced[-1] == path.stat().st_size == len(path.read_bytes())
    # Killed at once, without close: another process finds the release.
    ledger.close()
    with PrivacyLedger(path, SUBJECT) as again:
        assert again.releases == 1


def _spend_and_die(path: Path) -> None:
    PrivacyLedger(path, SUBJECT).spend(STEP)
    os.kill(os.getpid(), 9)


def test_a_kill_after_spending_loses_nothing(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_spend_and_die, args=(tmp_path / "ledger",))
    process.start()
    process.join(30)
    assert process.exitcode == -9
    with PrivacyLedger(tmp_path / "ledger", SUBJECT) as ledger:
        assert ledger.releases == 1


def test_the_budget_is_kept_exactly_and_across_openings(tmp_path: Path) -> None:
    path, epsilon = tmp_path / "ledger", 1.0
    most = affordable(epsilon, SUBJECT.delta, STEP)
    assert most > 4
    with PrivacyLedger(path, SUBJECT, epsilon) as ledger:
        for _ in range(most - 1):
            ledger.spend(STEP)
    with PrivacyLedger(path, SUBJECT, epsilon) as ledger:
        with pytest.raises(
            PrivacyError, match=r"2 more at noise multiplier 5 .* would exceed it\. Nothing was released"
        ):
            ledger.spend(STEP, 2)
        ledger.spend(STEP)
        with pytest.raises(PrivacyError, match=f"{most} releases have spent epsilon 0.9.* of 1 at delta 0.0001"):
            ledger.spend(STEP)
        with pytest.raises(PrivacyError, match="would exceed"):
            ledger.spend(Mechanism(0.0, 1.0))
        assert ledger.releases == most
    with PrivacyLedger(path, SUBJECT, 2 * epsilon) as ledger:
        ledger.spend(STEP)
        assert ledger.releases == most + 1


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_line_that_was_being_written_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "ledger"
    with PrivacyLedger(path, SUBJECT) as ledger:
        ledger.spend(STEP)
        whole = path.read_bytes()
        ledger.spend(STEP)
    path.write_bytes(path.read_bytes()[: len(whole) + cut])
    with PrivacyLedger(path, SUBJECT) as ledger:
        assert ledger.releases == 1
        ledger.spend(STEP)
    with PrivacyLedger(path, SUBJECT) as ledger:
        assert ledger.releases == 2


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def changed(line: bytes, **values: object) -> bytes:
    return json.dumps(json.loads(line) | values).encode() + b"\n"


@pytest.mark.parametrize(
    "damage",
    ["noise", "count", "left out", "exchanged", "garbage", "flipped", "header", "twice", "deep", "digits"],
)
def test_a_damaged_ledger_is_refused_with_the_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger"
    with PrivacyLedger(path, SUBJECT) as ledger:
        for noise in (1.0, 1.1, 1.2, 1.3):
            ledger.spend(Mechanism(noise, 0.2))
    lines = lines_of(path)
    lines, where = {
        "noise": ([*lines[:2], changed(lines[2], noise_multiplier=9.0), *lines[3:]], 3),
        "count": ([*lines[:2], changed(lines[2], count=0), *lines[3:]], 3),
        "left out": ([*lines[:2], *lines[3:]], 3),
        "exchanged": ([*lines[:2], lines[3], lines[2], lines[4]], 3),
        "garbage": ([*lines[:3], b"{\n", *lines[3:]], 4),
        "flipped": ([*lines[:4], lines[4].replace(b"1.3", b"1.4")], 5),
        "header": ([changed(lines[0], examples=2000), *lines[1:]], 1),
        "twice": ([*lines, lines[4]], 6),
        "deep": ([*lines[:2], b"[" * 100_000 + b"\n", *lines[3:]], 3),
        "digits": ([*lines[:2], lines[2].replace(b"1,", b"7" * 5000 + b",", 1), *lines[3:]], 3),
    }[damage]
    path.write_bytes(b"".join(lines))
    before = path.read_bytes()
    with pytest.raises(PrivacyError, match=f"damaged at line {where}"):
        PrivacyLedger(path, SUBJECT)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("subject", "message"),
    [(Subject("cd" * 32, 1000, 1e-4), "about another dataset"), (Subject("ab" * 32, 999, 1e-4), "examples 1000, not 999"),
     (Subject("ab" * 32, 1000, 1e-5), "delta 0.0001, not 1e-05")],
)  # fmt: skip
def test_a_ledger_about_something_else_is_refused(tmp_path: Path, subject: Subject, message: str) -> None:
    PrivacyLedger(tmp_path / "ledger", SUBJECT).close()
    with pytest.raises(PrivacyError, match=message):
        PrivacyLedger(tmp_path / "ledger", subject)


def test_one_run_at_a_time_has_it(tmp_path: Path) -> None:
    with PrivacyLedger(tmp_path / "ledger", SUBJECT), pytest.raises(PrivacyError, match="in use by another run"):
        PrivacyLedger(tmp_path / "ledger", SUBJECT)
    PrivacyLedger(tmp_path / "ledger", SUBJECT).close()


def test_a_copy_must_be_part_of_it(tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger", tmp_path / "copy"
    with PrivacyLedger(path, SUBJECT) as ledger:
        ledger.spend(STEP)
        early = path.read_bytes()
        ledger.spend(STEP)
        ledger.copy_to(copy)
        ledger.spend(STEP)
        ledger.require(copy)
    path.write_bytes(early)  # what was cut off at its end leaves a record that is whole in itself
    with PrivacyLedger(path, SUBJECT) as ledger, pytest.raises(PrivacyError, match="deleted, cut or exchanged"):
        ledger.require(copy)
    path.unlink()
    with PrivacyLedger(path, SUBJECT) as ledger, pytest.raises(PrivacyError, match="does not hold all that"):
        ledger.require(copy)


def test_a_full_disk_releases_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger"
    ledger = PrivacyLedger(path, SUBJECT)
    ledger.spend(STEP)
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:10]))
    with pytest.raises(InputError, match=r"cannot write the privacy ledger .*nothing was released"):
        ledger.spend(STEP)
    monkeypatch.undo()
    assert ledger.releases == 1
    with pytest.raises(InputError, match="cannot write"):
        ledger.spend(STEP)
    with PrivacyLedger(path, SUBJECT) as again:
        assert again.releases == 1


def test_bad_input_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be below 1/1000"):
        PrivacyLedger(tmp_path / "a", Subject("ab" * 32, 1000, 1e-3))
    with pytest.raises(InputError, match="a finite one above 0"):
        PrivacyLedger(tmp_path / "b", SUBJECT, -1.0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="cannot open the privacy ledger"):
        PrivacyLedger(tmp_path, SUBJECT)
    (tmp_path / "c").write_bytes(b'{"format": "something else"}\n')
    with pytest.raises(PrivacyError, match="damaged at line 1"):
        PrivacyLedger(tmp_path / "c", SUBJECT)
    with PrivacyLedger(tmp_path / "d", SUBJECT) as ledger, pytest.raises(InputError, match="at least 1"):
        ledger.spend(STEP, 0)
    with pytest.raises(InputError, match="cannot read the dataset"):
        Subject.of_file(tmp_path / "none", 10, 1e-3)
    (tmp_path / "data").write_text("x\n")
    assert Subject.of_file(tmp_path / "data", 10, 1e-3) != Subject.of_file(tmp_path / "c", 10, 1e-3)
