"""Run a federation with real models: an encrypted worker, processes of their own, an owner killed on the way."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.errors import InputError
from hecompile.models import TINY_LLAMA
from hecompile.runtime.federation.comparison import Lab, weighted_mean
from hecompile.runtime.federation.events import ROUND
from hecompile.runtime.federation.launch import processes, run_processes
from hecompile.runtime.federation.local_model import owner_model
from hecompile.runtime.federation.owner import local_trainer
from hecompile.runtime.federation.protocol.layout import mask_digest
from hecompile.runtime.federation.protocol.pruning import is_a
from hecompile.runtime.federation.protocol.settings import RoundHeader
from hecompile.runtime.federation.recipe import FederationRecipe, load_federation
from hecompile.runtime.federation.records import read_records
from hecompile.runtime.federation.report import accuracy_table, check_tables, evaluations
from hecompile.runtime.recipes.privacy import PrivacySection
from hecompile.runtime.wire.events import read_event
from tests.e2e.conftest import BATCH_SIZE, Build

RECIPE = TINY_LLAMA.parent / "recipes" / "federation.yaml"


def recipe(out: Path, *more: str) -> FederationRecipe:
    changes = [
        f"training.output_dir={out}",
        "training.max_steps=1",
        f"training.per_device_train_batch_size={BATCH_SIZE}",
    ]
    return load_federation(RECIPE, [*changes, "federation.rounds=3", *more])


def header(loaded: FederationRecipe, lab: Lab, mask: np.ndarray) -> RoundHeader:
    return RoundHeader(
        federation="0" * 32, number=1, nonce="0" * 32, agreement=loaded.agreement(), layout=lab.local.layout.digest(),
        mask=mask_digest(mask), adapter="0" * 64, coordinates=int(mask.sum()),
    )  # fmt: skip


def test_an_owner_behind_its_encrypted_worker_trains_as_one_in_plaintext(build: Build, tmp_path: Path) -> None:
    """Same layout, same data order; the update differs by the noise of the encrypted products."""
    loaded = recipe(tmp_path)
    lab = Lab.open(loaded)
    place = {"plan": build.directory / CLIENT, "worker_bundle": build.directory / WORKER}
    owner = loaded.owners[1].model_copy(update=place)
    adapter = lab.initial + np.random.default_rng(2).normal(0, 0.02, lab.initial.size).astype(np.float32)
    everything = np.ones(adapter.size, dtype=bool)
    plain = lab.trainers["owner-2"](header(loaded, lab, everything), adapter, everything)
    with owner_model(loaded, owner) as local:
        assert local.layout.digest() == lab.local.layout.digest()
        update = local_trainer(loaded, owner, local)(header(loaded, lab, everything), adapter, everything)
    assert update.samples == plain.samples == 60
    other = recipe(tmp_path, "lora.lora_alpha=8")
    with (
        pytest.raises(InputError, match=r"lora_alpha is 8\.0 but the model was exported with 16"),
        owner_model(other, owner),
    ):
        pass
    a, b = update.delta.astype(np.float64), plain.delta.astype(np.float64)
    # Adam's first step is the signs of the gradients: where these are smaller than the noise, signs differ.
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.9


def test_masks_frozen_a_and_the_proximal_term(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, "federation.freeze_a=true")
    lab = Lab.open(loaded)
    agreement = loaded.agreement()
    adapter, updates = lab.plain_round(agreement, 1, lab.initial)
    for name, where in lab.local.layout.slices():
        assert (adapter[where] == lab.initial[where]).all() == is_a(name), name
    assert np.allclose(adapter - lab.initial, weighted_mean(updates), atol=1e-7)
    # Rate 0.5 from here on: half of every B is zero and stays so.
    half = recipe(
        tmp_path, "federation.freeze_a=true", "federation.pruning.start_round=1", "federation.pruning.end_round=1"
    )
    pruned, _ = lab.plain_round(half.agreement(), 2, adapter)
    shares = [float((pruned[where] == 0).mean()) for name, where in lab.local.layout.slices() if not is_a(name)]
    assert min(shares) >= 0.49
    # A strong pull towards the global adapter shortens the way.
    near = loaded.federation.model_copy(update={"algorithm": "fedprox", "mu": 1e4})
    everything, trainer = np.ones(adapter.size, dtype=bool), lab.trainers["owner-1"]
    free = trainer.train(3, adapter, everything, loaded.federation, steps=3) - adapter
    held = trainer.train(3, adapter, everything, near, steps=3) - adapter
    assert np.linalg.norm(held) < 0.9 * np.linalg.norm(free)


def test_an_owner_killed_in_the_middle_of_a_round_does_not_stop_the_federation(tmp_path: Path) -> None:
    overrides = [f"training.output_dir={tmp_path}", "training.max_steps=1", "federation.rounds=2"]
    with processes(RECIPE, overrides) as running:
        assert running.server.stdout is not None
        first = read_event(running.server.stdout.readline())
        assert first is not None and (first["event"], first["number"], first["contributed"]) == (ROUND, 1, 3)
        running.owners["owner-2"].send_signal(signal.SIGKILL)
        _, errors = running.server.communicate(timeout=120)
        assert running.server.returncode == 0, errors
        for name in ("owner-1", "owner-3"):
            assert running.owners[name].wait(60) == 0
    records = read_records(tmp_path)
    assert [record.round for record in records] == [1, 2]
    assert list(records[1].contributors) == ["owner-1", "owner-3"] and records[1].samples == 100
    assert (tmp_path / "adapter/adapter_model.safetensors").read_bytes() == (
        tmp_path / "owner-1/adapter/adapter_model.safetensors"
    ).read_bytes()
    # The killed owner keeps the key of its round, to go on with; nobody else keeps one.
    left = {path.relative_to(tmp_path / "keys") for path in tmp_path.rglob("*.key") if path.name != "identity.key"}
    assert left <= {Path("owner-2/rounds/round-2.key")}


def test_a_federation_whose_processes_are_all_killed_goes_on_from_its_last_round(tmp_path: Path) -> None:
    overrides = [f"training.output_dir={tmp_path}", "training.max_steps=1", "federation.rounds=2"]
    with processes(RECIPE, overrides) as running:
        assert running.server.stdout is not None
        first = read_event(running.server.stdout.readline())
        assert first is not None and (first["event"], first["number"]) == (ROUND, 1)
        for process in (running.server, *running.owners.values()):
            process.send_signal(signal.SIGKILL)
    record = read_records(tmp_path)[0]
    metrics = (tmp_path / "owner-1/round-1/metrics.jsonl").read_bytes()
    said: list[str] = []
    with pytest.raises(InputError, match=r"training\.learning_rate was 0\.004 and is now 0\.1"):
        run_processes(RECIPE, [*overrides, "training.learning_rate=0.1"], said.append, resume=True)
    records = run_processes(RECIPE, overrides, said.append, resume=True)
    assert [one.round for one in records] == [1, 2] and records[0] == record
    assert all(list(one.contributors) == ["owner-1", "owner-2", "owner-3"] for one in records)
    assert (tmp_path / "owner-1/round-1/metrics.jsonl").read_bytes() == metrics
    adapters = {path.read_bytes() for path in tmp_path.rglob("adapter_model.safetensors")}
    assert len(adapters) == 1 and len(list(tmp_path.rglob("adapter_model.safetensors"))) == 4
    assert {path.name for path in tmp_path.rglob("*.key")} == {"identity.key"}
    with pytest.raises(InputError, match="there is nothing to resume"):
        run_processes(RECIPE, overrides, said.append, resume=True)


def long_line(folder: Path, tokens: int) -> Path:
    """A held-out file with one line of more tokens than that."""
    path = folder / "long.jsonl"
    path.write_text(json.dumps({"prompt": "Q:", "completion": " red" * tokens}) + "\n")
    return path


def test_lines_that_only_an_owners_own_plan_takes_are_in_the_tables(build: Build, tmp_path: Path) -> None:
    """The recipe's bucket is too short for them; what cannot be tabulated at all is refused before the first round."""
    loaded = recipe(tmp_path, "sequence_buckets=[16]")
    place = {"plan": build.directory / CLIENT, "worker_bundle": build.directory / WORKER}
    longer = loaded.owners[1].model_copy(update={"validation_file": long_line(tmp_path, 17)})
    others = [owner.model_copy(update={"validation_file": None}) for owner in loaded.owners]
    for owner, fits in ((longer, False), (longer.model_copy(update=place), True)):
        mixed = loaded.model_copy(update={"owners": [others[0], owner, others[2]]})
        if not fits:
            with pytest.raises(InputError, match=r"long\.jsonl, line 1"):
                check_tables(mixed, False)
            continue
        check_tables(mixed, False)
        lab = Lab.open(mixed, trains=False)
        row = evaluations(lab, lab.initial)
        assert row.keys() == {"owner-2", "all"} and row["owner-2"] == row["all"] and row["all"].loss > 0
        table = accuracy_table(mixed, {"it": lab.initial}, False, print)
        cells = [str(cell) for column in table.columns[1:] for cell in column.cells]
        assert cells == [f"0.0 %, {row['all'].loss:.3f}"] * 4


def test_a_comparison_that_privacy_forbids_is_refused_before_the_rounds_and_plain_tables_are_not(
    tmp_path: Path,
) -> None:
    loaded = recipe(tmp_path)
    promise = PrivacySection(epsilon=8.0, delta=1e-5, ledger=tmp_path / "ledger")
    private = loaded.owners[0].model_copy(update={"privacy": promise})
    mixed = loaded.model_copy(update={"owners": [private, *loaded.owners[1:]]})
    check_tables(mixed, False)
    with pytest.raises(InputError, match=r"owner-1 has a privacy section.*--no-compare"):
        check_tables(mixed, True)
    assert not (tmp_path / "ledger").exists()


def test_a_step_larger_than_an_owners_plan_is_refused_before_the_rounds(build: Build, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, f"training.per_device_train_batch_size={BATCH_SIZE + 1}")
    place = {"plan": build.directory / CLIENT, "worker_bundle": build.directory / WORKER}
    owner = loaded.owners[1].model_copy(update=place)
    with owner_model(loaded, owner) as local, pytest.raises(InputError, match="more than the plan of owner-2 takes"):
        local_trainer(loaded, owner, local)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("federation.threshold=1", "not more than half"),
        ("federation.pruning.end_rate=0.1", "the rate rises"),
        ("federation.treshold=2", "treshold"),
        ("owners=[]", "owners"),
        ("training.eval_steps=2", "evaluates at its end"),
        ("model=/nowhere", "no model directory"),
        ("federation.max_samples=10", "over federation.max_samples"),
    ],
)
def test_recipes_that_cannot_work(tmp_path: Path, change: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Lab.open(recipe(tmp_path, change))
