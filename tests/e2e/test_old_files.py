"""Open what an earlier version wrote: bundles, checkpoints and a ledger from before the modules were moved.

`old_files/made_by.md` says how they were made. They stay as they are; what cannot read them any more is what is wrong.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hecompile.bundles.ckks import CkksPlan, open_worker, read_table
from hecompile.bundles.client import ClientBundle
from hecompile.bundles.worker import WorkerBundle
from hecompile.cli.main import app
from hecompile.runtime.ckks.client import CkksSession
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.functions import functions_of
from hecompile.runtime.client.products import CleartextProducts, EncryptedProducts, Products
from hecompile.runtime.model.adapter import WEIGHTS_FILE, load_adapter
from hecompile.runtime.model.evaluation import inference
from hecompile.runtime.privacy.ledger import PrivacyLedger, Subject
from hecompile.runtime.training.metrics import read_metrics
from hecompile.runtime.transports import InProcessTransport
from hecompile.runtime.worker.process import running_server
from hecompile.runtime.worker.worker import Worker

OLD_FILES = Path(__file__).parent / "old_files"
EXPECTED: dict[str, Any] = json.loads((OLD_FILES / "expected.json").read_text(encoding="utf-8"))
EXAMPLES, DELTA, EPSILON = 10, 1e-3, 3.0


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Copy all of it, the ledger with its own name."""
    copy = shutil.copytree(OLD_FILES, tmp_path / "old")
    shutil.copyfile(copy / "private" / "spent-ledger.bin", copy / "train.jsonl.ledger")
    return copy


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """Read the tokens, and the logits that the old code computed."""
    with np.load(OLD_FILES / "expected.npz", allow_pickle=False) as stored:
        return dict(stored)


def command(*arguments: str) -> str:
    """Run `hecompile` with these arguments; what it printed. Raises what it raised."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def losses(run: Path) -> list[float]:
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    return [record["loss"] for record in records]


def logits_of(bundle: ClientBundle, products: Products, old: Path, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Compute those of the finished run's adapter."""
    model = EncryptedCausalLM(bundle, products)
    load_adapter(model, old / "finished" / "adapter")
    mask = torch.from_numpy(arrays["mask"])
    with inference(model):
        found: np.ndarray = model(torch.from_numpy(arrays["tokens"]), mask, logits_to_keep=mask.bool()).logits.numpy()
    return found


def test_the_bundles_open(old: Path) -> None:
    client, worker = ClientBundle.open(old / "linear" / "client"), WorkerBundle.open(old / "linear" / "worker")
    assert client.plan_id == client.plan.plan_id() == worker.plan_id == EXPECTED["plans"]["linear"]
    assert client.circuits.keys() == worker.circuits.keys() - {"known_answer"} and len(client.circuits) == 8
    kinds = {np.load(path, mmap_mode="r").dtype.name for path in client.hints.iterdir()}
    assert kinds == {"int32", "float32"}  # words, and transforms
    polynomial = ClientBundle.open(old / "polynomial" / "client")
    assert polynomial.plan_id == EXPECTED["plans"]["polynomial"] and polynomial.plan.hints == "none"
    wanted = {"attention": "gaussian_kernel", "norm": "polynomial", "activation": "polynomial"}
    assert functions_of(polynomial.graph()) == wanted
    shown = {name: command("inspect", str(old / name)) for name in ("linear", "polynomial", "ckks")}
    assert "variance 0.016 … 0.794" in shown["polynomial"] and "36 levels without refreshes" in shown["ckks"]


def test_logits_are_the_old_ones(old: Path, arrays: dict[str, np.ndarray]) -> None:
    """Compares with what the old code computed from the same integers: exactly, and on ciphertexts within their noise."""
    client, worker = ClientBundle.open(old / "linear" / "client"), WorkerBundle.open(old / "linear" / "worker")
    with pytest.warns(UserWarning, match="NOTHING IS ENCRYPTED"):
        cleartext = CleartextProducts(client, worker)
    found = logits_of(client, cleartext, old, arrays)
    np.testing.assert_allclose(found, arrays["logits"], rtol=0, atol=1e-4)
    # The polynomial plan is of the same weights, so that the same worker serves where nothing is encrypted.
    found = logits_of(ClientBundle.open(old / "polynomial" / "client"), cleartext, old, arrays)
    np.testing.assert_allclose(found, arrays["polynomial_logits"], rtol=0, atol=1e-3)
    products = EncryptedProducts(client, InProcessTransport(Worker(worker, "onnxruntime").exchange))
    error = np.abs(logits_of(client, products, old, arrays) - arrays["logits"])
    # The old code's noise was 3e-4 to 5e-4 at most, rms 6e-5 to 8e-5; the logits' standard deviation is 1.1.
    assert 0 < error.max() < 2e-3 and np.sqrt((error**2).mean()) < 2e-4


def test_a_run_goes_on_from_its_old_checkpoint(old: Path) -> None:
    run, finished = old / "run", old / "finished"
    first = read_metrics(run / "metrics.jsonl")
    assert "4 steps" in command("train", str(old / "recipe.yaml"), "--resume")
    assert (run / "checkpoint-4").is_dir() and read_metrics(run / "metrics.jsonl")[:2] == first
    assert losses(run) == pytest.approx(losses(finished), abs=1e-3)
    assert losses(finished) == pytest.approx(EXPECTED["losses"])
    before = load_file(run / "checkpoint-2" / WEIGHTS_FILE)
    resumed, straight = (load_file(at / "adapter" / WEIGHTS_FILE) for at in (run, finished))
    assert resumed.keys() == straight.keys() == before.keys()
    for name, value in straight.items():
        moved = (value - before[name]).norm()
        assert moved > 0 and (resumed[name] - value).norm() < 0.01 * moved, name


def test_the_ledger_reports_what_was_spent_and_goes_on(old: Path) -> None:
    path, spent = old / "train.jsonl.ledger", EXPECTED["spent"]
    subject, before = Subject.of_ledger(path), path.read_bytes()
    assert subject == Subject.of_file(old / "train.jsonl", EXAMPLES, DELTA)
    with PrivacyLedger(path, subject, EPSILON) as ledger:
        ledger.require(old / "private" / "run" / "checkpoint-2" / "privacy_ledger.jsonl")
        assert ledger.releases == spent["releases"] == 3 and ledger.spent() == pytest.approx(spent["epsilon"])
        assert ledger.last is not None and ledger.last.noise_multiplier == spent["noise"]
    shown = command("privacy", str(path))
    assert f"{EXAMPLES} examples" in shown and f"epsilon {spent['epsilon']:.4g} at delta {DELTA:g}" in shown
    assert "4 steps" in command("train", str(old / "private.yaml"), "--resume")
    assert path.read_bytes().startswith(before)
    with PrivacyLedger(path, subject, EPSILON) as ledger:
        assert ledger.releases == 5  # step 3 was entered before the stop, and is taken and paid for again
        assert spent["epsilon"] < ledger.spent() <= EPSILON


def test_a_ckks_bundle_opens_and_gives_the_old_logits(old: Path, arrays: dict[str, np.ndarray]) -> None:
    client, worker = old / "ckks" / "client", old / "ckks" / "worker"
    plan = CkksPlan.read(client)
    assert plan == open_worker(worker)[0] and plan.plan_id == EXPECTED["plans"]["ckks"]
    assert read_table(client, plan).shape == (259, 8)
    address = f"unix://{old}/s"
    serve = [sys.executable, "-m", "hecompile.cli", "ckks", "serve", str(worker), "--listen", address]
    with running_server([*serve, "--events", "json"]), CkksSession(client, address) as session:
        found = session.logits(arrays["ckks_tokens"])
    expected = arrays["ckks_logits"]
    assert found.shape == expected.shape == (3, 2, 259)
    assert np.abs(found - expected).max() < 2e-3 * (expected.max() - expected.min())
