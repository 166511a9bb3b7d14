"""Open what a recipe names: the client bundle, a worker (in process or on a socket) and the model over both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.worker import WorkerBundle
from hecompile.checkpoint.tokenizer import load_tokenizer as read_tokenizer
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.fetched_hints import Fetching
from hecompile.runtime.client.products import CleartextProducts, EncryptedProducts, Products
from hecompile.runtime.model.backend import ForwardPass
from hecompile.runtime.model.evaluation import inference
from hecompile.runtime.recipes.training import Recipe
from hecompile.runtime.recipes.workplace import Workplace
from hecompile.runtime.transports import InProcessTransport, Replicas, RetryPolicy, Transport, connect_for
from hecompile.runtime.transports.directory import fetch_workers
from hecompile.runtime.transports.hint_url import HintFolder
from hecompile.runtime.wire.address import DIRECTORY_SCHEMES
from hecompile.runtime.wire.credentials import ClientCredentials
from hecompile.runtime.worker.engines import DEFAULT_ENGINE
from hecompile.runtime.worker.worker import Worker


@dataclass(frozen=True)
class Session:
    """Hold an open plan: the model, its tokenizer, and the bundle that both came from."""

    model: EncryptedCausalLM
    tokenizer: PreTrainedTokenizerBase
    bundle: ClientBundle

    def forward(self, tokens: NDArray[np.int64]) -> ForwardPass:
        """See `hecompile.runtime.model.backend.RemoteModel`. Rows go to the worker in batches as large as the plan takes."""
        model, ids = self.model, torch.from_numpy(tokens)
        before, start = model.stats(), time.perf_counter()
        with inference(model):
            batches = [model(part, torch.ones_like(part)).logits for part in ids.split(model.batch_size)]  # [b, S, V]
        total, after = time.perf_counter() - start, model.stats()
        spent = {name: after[name] - before[name] for name in after}
        client = total - spent["worker_seconds"] - spent["wire_seconds"]
        logits = torch.cat(batches).numpy()  # [B, S, V]
        return ForwardPass(logits, total, client, int(spent["bytes_up"]), int(spent["bytes_down"]))


@contextmanager
def open_session(place: Workplace) -> Iterator[Session]:
    """Open everything that `place` names; the connection is closed at the end. Raises HecompileError.

    The initial adapter of a recipe comes from its seed.
    """
    bundle = ClientBundle.open(place.model)
    tokenizer = load_tokenizer(bundle)
    products = open_products(bundle, place)
    seed = place.training.seed if isinstance(place, Recipe) else 0
    try:
        dtype = getattr(torch, place.head_products)
        yield Session(EncryptedCausalLM(bundle, products, seed, head_dtype=dtype), tokenizer, bundle)
    finally:
        products.close()


def connect_workers(place: Workplace, besides: int = 0) -> Replicas:
    """Make a transport to the workers, not opened yet; each has a connection for every request in flight, and `besides`."""
    section, in_flight, credentials = place.connection, place.requests_in_flight + besides, _credentials(place)

    def pool(address: str) -> Transport:
        return connect_for(address, in_flight, credentials, section.reply_timeout)

    def discover() -> dict[str, Callable[[], Transport]]:
        return {address: partial(pool, address) for address in fetch_workers(place.workers[0], credentials)}

    policy, leave_bad = RetryPolicy(section.attempts), section.on_bad_worker == "retry-elsewhere"
    if place.workers[0].startswith(DIRECTORY_SCHEMES):
        return Replicas(discover(), policy, discover, leave_bad)
    return Replicas({address: partial(pool, address) for address in place.workers}, policy, leave_bad=leave_bad)


def _credentials(place: Workplace) -> ClientCredentials:
    section = place.connection
    return ClientCredentials.load(section.authority, section.certificate, section.key, section.token)


def _fetching(place: Workplace) -> Fetching:
    """Return how hints are fetched, where the plan has them fetched."""
    section, folder = place.connection, None
    if section.hints is not None:
        server = HintFolder(section.hints, _credentials(place), section.reply_timeout, RetryPolicy(section.attempts))
        folder = server.hint
    return Fetching(section.hint_cache, place.requests_in_flight, folder)


def load_tokenizer(bundle: ClientBundle) -> PreTrainedTokenizerBase:
    """Load the tokenizer that travels with the plan: the original checkpoint is not needed."""
    return read_tokenizer(bundle.tokenizer)


def open_products(bundle: ClientBundle, place: Workplace) -> Products:
    """Connect to the worker. The cleartext engine is used only where the recipe names it."""
    if place.worker != "inprocess":
        elsewhere = place.connection.on_bad_worker == "retry-elsewhere"
        # The largest hint would hold up the requests of a connection for long.
        workers = connect_workers(place, besides=1 if bundle.plan.hints == "fetched" else 0)
        return EncryptedProducts(bundle, workers, retry_elsewhere=elsewhere, fetching=_fetching(place))
    assert place.worker_bundle is not None  # it was validated
    worker_bundle = WorkerBundle.open(place.worker_bundle)
    if place.engine == "cleartext":
        return CleartextProducts(bundle, worker_bundle)
    worker = Worker(worker_bundle, place.engine or DEFAULT_ENGINE)
    return EncryptedProducts(bundle, InProcessTransport(worker.exchange), fetching=_fetching(place))
