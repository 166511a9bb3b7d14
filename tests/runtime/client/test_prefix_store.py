"""The store of what is kept for each example: within its budget, encrypted on disk, and nothing lost where that fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hecompile.runtime.client.prefix_store import PrefixStore


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> PrefixStore:
    return PrefixStore(1000, tmp_path if request.param == "file" else None)


def test_a_store_gives_back_what_it_was_given(store: PrefixStore, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        store.put(number, b"text %d" % number, bytes([number]) * 200)
    assert [store.get(number, b"text %d" % number) for number in range(3)] == [bytes([n]) * 200 for n in range(3)]
    assert store.get(7, b"text 7") is None and not caplog.records
    assert store.get(1, b"another text") is None and store.get(1, b"text 1") is None and len(store) == 2
    assert "what was kept of an example is dropped, and computed again: it is of another text" in caplog.text
    store.close()
    assert len(store) == 0


def test_a_file_shows_nothing_has_no_name_and_notices_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = PrefixStore(1000, tmp_path)
    assert store._file is not None and list(tmp_path.iterdir()) == []
    store.put(0, b"a", b"marzipan" * 20)
    store.put(1, b"b", b"marzipan" * 20)
    descriptor = store._file.fileno()
    raw = os.pread(descriptor, 1000, 0)
    assert len(raw) == 2 * (160 + 16) and b"marzipan" not in raw and raw[:160] != raw[176:336]
    os.pwrite(descriptor, bytes([raw[5] ^ 1]), 5)
    assert store.get(0, b"a") is None and store.get(1, b"b") == b"marzipan" * 20
    assert "the file was changed or damaged" in caplog.text and "marzipan" not in caplog.text
    os.pwrite(descriptor, raw[:176], 176)  # one record in the place of another
    assert store.get(1, b"b") is None and len(store) == 0


def test_a_full_disk_ends_keeping_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = PrefixStore(1000, tmp_path)
    store.put(0, b"a", b"x" * 100)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    for number in (1, 2):
        store.put(number, b"b", b"x" * 100)
    assert store.get(0, b"a") == b"x" * 100 and store.get(1, b"b") is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("prefix_cache: No space left on device. 1 examples are kept")


def test_a_forked_process_reads_but_keeps_nothing(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(0, b"a", b"x" * 100)
    forked = os.getpid() + 1
    monkeypatch.setattr(os, "getpid", lambda: forked)
    store.put(1, b"b", b"y" * 100)
    assert store.get(0, b"a") == b"x" * 100 and store.get(1, b"b") is None and len(store) == 1
