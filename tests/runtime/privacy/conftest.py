"""Compile the random two-layer Llama once for the tests that go through a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler.linear import compile_checkpoint
from tests.support.tiny import OPTIONS, save_checkpoint
from tests.support.training import BUCKETS


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[ClientBundle, WorkerBundle]:
    directory = tmp_path_factory.mktemp("privacy")
    options = replace(OPTIONS, batch_size=4, sequence_buckets=BUCKETS)
    compile_checkpoint(str(save_checkpoint(directory / "checkpoint")), directory / "build", options)
    return ClientBundle.open(directory / "build" / CLIENT), WorkerBundle.open(directory / "build" / WORKER)
