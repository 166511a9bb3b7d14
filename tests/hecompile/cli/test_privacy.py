from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from hecompile.cli.main import app
from hecompile.errors import InputError, PrivacyError
from hecompile.runtime.privacy.accountant import Mechanism, spent_epsilon
from hecompile.runtime.privacy.ledger import PrivacyLedger, Subject

STEP = Mechanism(2.5, 0.25)


def test_it_shows_what_was_spent_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "data.ledger"
    with PrivacyLedger(path, Subject("ab" * 32, 500, 1e-3)) as ledger:
        ledger.spend(STEP, 7)
    before = path.read_bytes()
    result = CliRunner().invoke(app, ["privacy", str(path), "--delta", "1e-5"])
    assert result.exit_code == 0 and path.read_bytes() == before
    unsampled = spent_epsilon([(Mechanism(2.5, 1.0), 7)], 1e-3)
    for text in (
        "500 examples",
        f"epsilon {spent_epsilon([(STEP, 7)], 1e-3):.4g} at delta 0.001 ({unsampled:.4g} to somebody",
        f"epsilon {spent_epsilon([(STEP, 7)], 1e-5):.4g} at delta 1e-05",
    ):
        assert text in result.output


def test_what_is_no_ledger_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a ledger\n")
    for name, kind, message in (("none", InputError, "cannot read"), ("text", PrivacyError, "is not a privacy ledger")):
        error = CliRunner().invoke(app, ["privacy", str(tmp_path / name)]).exception
        assert isinstance(error, kind) and message in str(error)
    assert not (tmp_path / "none").exists()
