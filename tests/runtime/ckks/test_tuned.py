"""Train an adapter through the encrypted worker, merge it by `ckks export --adapter`, evaluate it on ciphertexts."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from typer.testing import CliRunner

from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.cli.main import app
from hecompile.compiler.ckks import CkksOptions, lower_checkpoint
from hecompile.compiler.frontend import load_checkpoint
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.graph.interpreter import Interpreter
from hecompile.he.random.sampling import PublicSeed
from hecompile.passes.polynomial.expand_polynomials import EMBEDDINGS
from hecompile.runtime.ckks.client import CkksSession
from hecompile.runtime.ckks.worker import CkksWorker
from hecompile.runtime.client.session import open_session
from hecompile.runtime.model.backend import ForwardPass, RemoteModel
from hecompile.runtime.recipes.training import Recipe
from hecompile.runtime.training.train import run_training
from tests.runtime.ckks.support import LEVELS, small_llama
from tests.support.training import make_tokenizer

TOKENS = np.array([[1, 100, 103], [1, 102, 101], [1, 101, 100]])


def recipe(directory: Path) -> Recipe:
    text = directory / "train.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in ("abcabc", "cbacba", "bcabca", "aabbcc")))
    model = load_checkpoint(str(small_llama(directory / "model"))).model
    # The padding token's row is zero: were it in the calibration text, the norms' domain would reach to zero.
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = model.get_input_embeddings().weight[3]  # type: ignore[operator]
    model.save_pretrained(directory / "model")
    options = CompileOptions(batch_size=4, sequence_buckets=(8,), public_seed=PublicSeed(bytes(32)))
    compile_checkpoint(str(directory / "model"), directory / "plan", options)
    return Recipe.model_validate(
        {
            "model": directory / "plan" / CLIENT, "worker_bundle": directory / "plan" / WORKER, "engine": "torch",
            "data": {"train_file": text},
            "training": {
                "output_dir": directory / "run", "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 2e-2,
                "save_strategy": "no", "disable_tqdm": True, "seed": 3,
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ForwardPass, ForwardPass]:
    """Return the directory of model/ and run/adapter/, and the interactive plan's passes before training and after it."""
    directory = tmp_path_factory.mktemp("tuned")
    wanted = recipe(directory)
    with open_session(wanted) as session:
        before = tried(session)
        run_training(session.model, session.tokenizer, wanted)
        return directory, before, tried(session)


def tried(model: RemoteModel) -> ForwardPass:
    return model.forward(TOKENS)


@contextmanager
def serving(bundle: Path, path: Path) -> Iterator[str]:
    """Serve one session in a thread."""
    worker = CkksWorker(bundle, threads=2)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                worker.serve(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"unix://{path}"
        thread.join(timeout=30)
        assert not thread.is_alive()


def cleartext(directory: Path) -> np.ndarray:
    """Return logits [B, S, V] of the polynomial graph of a checkpoint."""
    checkpoint = load_checkpoint(str(directory))
    graph, _, _ = lower_checkpoint(checkpoint, CkksOptions(3, LEVELS))
    with torch.no_grad():
        embeddings = checkpoint.model.get_input_embeddings()(torch.from_numpy(TOKENS))  # type: ignore[operator]
        return np.asarray(Interpreter(graph).run({EMBEDDINGS: embeddings})["logits"])


def test_what_was_trained_encrypted_is_evaluated_encrypted(
    tuned: tuple[Path, ForwardPass, ForwardPass], tmp_path: Path
) -> None:
    directory, before, interactive = tuned
    model, adapter, build = directory / "model", directory / "run" / "adapter", tmp_path / "build"
    options = ["--model", str(model), "--out", str(build), "--sequence-length", "3", "--levels", str(LEVELS)]
    exported = CliRunner().invoke(app, ["ckks", "export", *options, "--adapter", str(adapter)])
    assert exported.exit_code == 0, exported.output
    with serving(build / "worker", tmp_path / "s") as address, CkksSession(build / "client", address) as session:
        found = tried(session)
    # The reference is merged by PEFT itself, in the clear, and lowered by itself.
    adapted: Any = peft.PeftModel.from_pretrained(load_checkpoint(str(model)).model, str(adapter))
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    make_tokenizer().save_pretrained(tmp_path / "merged")
    expected = cleartext(tmp_path / "merged")  # [B, S, V]
    spread = float(expected.max() - expected.min())
    assert found.logits.shape == expected.shape == (3, 3, 259)
    assert np.abs(found.logits - expected).max() < 1e-3 * spread
    assert np.abs(found.logits - before.logits).max() > 0.1 * spread
    # The other scheme and protocol, with the same adapter on the client; 8 bits of precision.
    assert np.abs(interactive.logits - expected).max() < 0.05 * spread


def test_a_pass_says_what_it_cost(tuned: tuple[Path, ForwardPass, ForwardPass]) -> None:
    _, before, after = tuned
    assert 0 < after.client_seconds < after.total_seconds
    # Three rows of three tokens each, the same messages again but for their numbers.
    assert before.bytes_up == pytest.approx(after.bytes_up, rel=0.02) and after.bytes_up > 0
    assert before.bytes_down == pytest.approx(after.bytes_down, rel=0.02) and after.bytes_down > 0
