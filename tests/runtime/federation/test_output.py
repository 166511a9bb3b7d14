"""What a federation finds in its output directory: a finished one is not replaced unasked, nor by one that never begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecompile.errors import FederationError, InputError
from hecompile.files import only_writer
from hecompile.models import TINY_LLAMA
from hecompile.runtime.federation.launch import run_processes
from hecompile.runtime.federation.output import clear_owner, clear_server, require_free
from hecompile.runtime.federation.owner import join
from hecompile.runtime.federation.recipe import FederationRecipe, load_federation
from hecompile.runtime.federation.server import serve
from hecompile.runtime.wire.events import emit

RECIPE = TINY_LLAMA.parent / "recipes" / "federation.yaml"
KEEP, REPLACE = ("training.overwrite_output_dir=false",), ("training.overwrite_output_dir=true",)


def loaded(out: Path, *overrides: str) -> FederationRecipe:
    return load_federation(RECIPE, [f"training.output_dir={out}", *overrides])


def finished(out: Path) -> dict[Path, bytes]:
    """A federation's files, and others that a user may have there."""
    for name in ("rounds.jsonl", "adapter/weights", "owner-1/adapter/weights", "owner-1/round-1/metrics.jsonl",
                 "owner-1/data.jsonl", "keys/owner-1/identity.key", "notes.txt"):  # fmt: skip
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(bytes(32))
    return files(out)


def files(out: Path) -> dict[Path, bytes]:
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_finished_federation_is_refused_by_every_process_and_stays_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    before, recipe = finished(out), loaded(out, *KEEP)
    said: list[str] = []
    for start, held in (
        (lambda: run_processes(RECIPE, [f"training.output_dir={out}", *KEEP], said.append), r"rounds\.jsonl"),
        (lambda: serve(recipe, {}, 0, emit), r"rounds\.jsonl"),
        (lambda: join(recipe, "owner-1", {}, tmp_path / "keys", "tcp://127.0.0.1:9"), "owner-1/adapter"),
    ):
        with pytest.raises(InputError) as caught:
            start()  # type: ignore[no-untyped-call]
        assert caught.match(
            rf"output_dir {out} already holds a federation \({held}\), which cannot be continued; choose another "
            r"directory, or set training\.overwrite_output_dir=true to replace it$"
        )
    assert files(out) == before and not said and not (tmp_path / "keys").exists()


def test_two_federations_do_not_write_into_one_directory(tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", loaded(tmp_path / "out", *REPLACE)
    overrides = [f"training.output_dir={out}", *REPLACE]
    said: list[str] = []
    for held, start in (
        (out, lambda: serve(recipe, {}, 0, emit)),
        (out, lambda: run_processes(RECIPE, overrides, said.append)),
        (out / "keys", lambda: run_processes(RECIPE, overrides, said.append)),
        (out / "owner-1", lambda: join(recipe, "owner-1", {}, tmp_path / "keys", "tcp://127.0.0.1:9")),
    ):
        with only_writer(held, folder=True):
            with pytest.raises(
                InputError, match=r"training\.output_dir.* is being written by another process \(\d+\)"
            ):
                start()  # type: ignore[no-untyped-call]
            assert not any(path.suffix != ".lock" and path.name != ".lock" for path in files(out))
    assert not list(tmp_path.iterdir()) and not said


def test_without_the_key_a_recipe_replaces_nothing() -> None:
    section = loaded(Path("x")).training
    assert section.overwrite_output_dir  # the shipped recipe: its command may be repeated
    assert not type(section)(output_dir=Path("x")).overwrite_output_dir


def test_one_that_cannot_begin_costs_nothing_even_where_it_may_replace(tmp_path: Path) -> None:
    before = finished(tmp_path)
    said: list[str] = []
    overrides = [f"training.output_dir={tmp_path}", *REPLACE, "model=/nowhere"]
    with pytest.raises(FederationError, match=r"the server did not start: .*no model directory"):
        run_processes(RECIPE, overrides, said.append)
    assert said == [f"replacing the federation in {tmp_path} (training.overwrite_output_dir)"]
    assert before.items() <= files(tmp_path).items()
    with pytest.raises(FederationError, match="no federation answers at"):
        join(loaded(tmp_path, *REPLACE), "owner-1", {}, tmp_path / "keys/owner-1", "tcp://127.0.0.1:9")
    assert before.items() <= files(tmp_path).items()


def test_what_is_replaced_is_a_federations_alone(tmp_path: Path) -> None:
    finished(tmp_path)
    assert require_free(loaded(tmp_path, *REPLACE).training, server=True, owners=["owner-1"])
    clear_server(tmp_path)
    clear_owner(tmp_path, "owner-1")
    assert {str(path) for path in files(tmp_path)} == {"owner-1/data.jsonl", "keys/owner-1/identity.key", "notes.txt"}
    assert not require_free(loaded(tmp_path, *KEEP).training, server=True, owners=["owner-1"])


def test_one_that_failed_in_its_first_round_is_nothing_to_keep(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "rounds.jsonl").touch()
    assert not require_free(loaded(tmp_path, *KEEP).training, server=True, owners=["owner-1"])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file; name a directory"):
        require_free(loaded(tmp_path / "file", *KEEP).training, server=True)
