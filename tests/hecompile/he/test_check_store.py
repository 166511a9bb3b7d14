"""Check vectors on disk: private, several sets, and a set that has caught a lie is never used again, whoever asks."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hecompile.errors import InputError, VerificationError
from hecompile.he.check_store import SERIES, CheckStore, write_checks
from hecompile.he.check_vectors import Checks
from hecompile.he.random.sampling import SecretRandom
from tests.hecompile.he.test_verification import Product

NAMES = ["a.forward", "b.backward"]


@pytest.fixture
def product() -> Product:
    return Product(inputs=20, outputs=30)


@pytest.fixture
def folder(tmp_path: Path, product: Product) -> Path:
    for name in NAMES:
        write_checks(tmp_path / "checks", name, *[Checks.draw(product.weight, SecretRandom()) for _ in range(SERIES)])
    return tmp_path / "checks"


def test_a_spent_set_makes_way_for_another_for_all_circuits_and_for_good(folder: Path, product: Product) -> None:
    store, other = CheckStore(folder, NAMES), CheckStore(folder, NAMES)
    seen = []
    for series in range(SERIES):
        assert store.left == other.left == SERIES - series
        both = [store.checks(name, product.linear) for name in NAMES]
        assert [checks.series for checks in both] == [series] * 2
        seen += [checks.vectors.tobytes() for checks in both]
        other.spend(series)
        other.spend(series)  # by another thread or process, on another reply: the same set
    assert len(set(seen)) == 2 * SERIES
    assert store.left == 0
    with pytest.raises(VerificationError, match=rf"all {SERIES} set\(s\) .* are spent.*export again"):
        store.checks(NAMES[0], product.linear)
    with pytest.raises(InputError, match=r"are spent.*export again"):
        CheckStore(folder, NAMES)


def test_a_set_spent_by_a_process_that_was_killed_stays_spent(folder: Path, product: Product) -> None:
    code = (
        "import os, pathlib, sys; from hecompile.he.check_store import CheckStore; "
        f"CheckStore(pathlib.Path(sys.argv[1]), {NAMES!r}).spend(0); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == -9
    assert CheckStore(folder, NAMES).checks(NAMES[0], product.linear).series == 1
    assert stat.S_IMODE((folder / "spent.0").stat().st_mode) == 0o600


def test_a_mark_that_cannot_be_written_ends_the_run(folder: Path) -> None:
    store = CheckStore(folder, NAMES)
    (folder / "spent.0").symlink_to(folder / "missing" / "file")
    with pytest.raises(VerificationError, match=r"spent.0 cannot be written .* export again"):
        store.spend(0)
    assert store.left == SERIES - 1 and CheckStore(folder, NAMES).left == SERIES - 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_marked_is_refused(folder: Path) -> None:
    folder.chmod(0o500)
    with pytest.raises(InputError, match="not writable"):
        CheckStore(folder, NAMES)
    folder.chmod(0o700)


def test_a_file_with_fewer_sets_bounds_those_of_all(folder: Path, product: Product) -> None:
    write_checks(folder, NAMES[1], Checks.draw(product.weight, SecretRandom()))
    store = CheckStore(folder, NAMES)
    assert store.left == 1
    store.spend(0)
    with pytest.raises(VerificationError, match="export again"):
        store.checks(NAMES[0], product.linear)


def test_files_of_another_kind_are_refused(folder: Path, product: Product) -> None:
    for wrong in (np.zeros((2, 3, 4, 5)), np.zeros((3, 26, 7), np.uint8), np.zeros(5)):
        np.save(folder / f"{NAMES[0]}.npy", wrong)
        with pytest.raises(InputError, match="export again"):
            CheckStore(folder, NAMES).checks(NAMES[0], product.linear)
