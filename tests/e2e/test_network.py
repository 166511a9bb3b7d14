"""Run the whole client over Open Inference Protocol: a training step with a worker over TLS, and with a server of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch.nn.functional as F
from torch import Tensor

from hecompile.bundles.kinds import CLIENT
from hecompile.demonstrations.small import RECIPE
from hecompile.runtime.client.session import open_session
from hecompile.runtime.recipes.training import load_recipe
from hecompile.runtime.wire.credentials import ServerCredentials
from hecompile.runtime.wire.development_certificates import (
    AUTHORITY,
    CLIENT_KEY,
    SERVER,
    SERVER_KEY,
    TOKEN,
    make_development_certificates,
)
from hecompile.runtime.wire.development_certificates import CLIENT as CLIENT_CERTIFICATE
from hecompile.runtime.worker.servers.open_server import open_server
from hecompile.runtime.worker.worker import Worker
from tests.e2e.conftest import Build
from tests.e2e.precision.test_gradients import gradients
from tests.support.foreign_server import ForeignServer


@contextmanager
def worker_over_tls(build: Build, folder: Path) -> Iterator[list[str]]:
    """Run a worker that wants certificates and a token; yield what a recipe says of it."""
    make_development_certificates(folder)
    served = ServerCredentials.load(*(folder / name for name in (SERVER, SERVER_KEY, AUTHORITY, TOKEN)))
    files = {"authority": AUTHORITY, "certificate": CLIENT_CERTIFICATE, "key": CLIENT_KEY, "token": TOKEN}
    with open_server(Worker(build.worker), "grpcs://127.0.0.1:0", credentials=served) as server:
        shown = [f"connection.{name}={folder / file}" for name, file in files.items()]
        yield [f"worker={server.address}", *shown]


@contextmanager
def server_of_others(build: Build, _: Path) -> Iterator[list[str]]:
    """Run a server that has the model repository of the worker bundle, and nothing of this program."""
    with ForeignServer(build.worker.directory / "circuits") as server:
        yield [f"worker={server.address}"]


@pytest.mark.parametrize("opened", [worker_over_tls, server_of_others])
def test_a_step_is_that_of_an_embedded_worker(
    build: Build,
    batch: dict[str, Tensor],
    adapter: dict[str, Tensor],
    tmp_path: Path,
    opened: Callable[[Build, Path], AbstractContextManager[list[str]]],
) -> None:
    with opened(build, tmp_path / "keys") as overrides:
        overrides += [f"model={build.directory / CLIENT}", f"training.output_dir={tmp_path}"]
        with open_session(load_recipe(RECIPE, overrides)) as session:
            session.model.load_adapter_state(adapter)
            loss, gradient = gradients(session.model, batch)
            costs = session.model.products.costs
    assert costs.bytes_up > 0 and costs.bytes_down > 0
    assert (costs.worker_seconds > 0) == (opened is worker_over_tls), "others do not say"
    embedded = build.encrypted()
    embedded.load_adapter_state(adapter)
    expected_loss, expected = gradients(embedded, batch)
    assert loss == pytest.approx(expected_loss, rel=0.01)
    for name, value in expected.items():
        assert F.cosine_similarity(gradient[name].flatten(), value.flatten(), dim=0) > 0.998, name
