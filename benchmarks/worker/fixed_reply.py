"""Serve a worker that does no work, to measure what is around it: a circuit has one reply per number of tokens, made once.

    python -m benchmarks.worker.fixed_reply BUNDLE ADDRESS [CREDENTIALS]      serve until terminated; prints one event

CREDENTIALS is a folder of `make_development_certificates`; the worker then shows its certificate and asks for the token.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from hecompile.bundles.worker import WorkerBundle
from hecompile.runtime.wire.credentials import ServerCredentials
from hecompile.runtime.wire.development_certificates import SERVER, SERVER_KEY, TOKEN
from hecompile.runtime.wire.events import emit
from hecompile.runtime.worker.engines.base import check_request
from hecompile.runtime.worker.servers.serve import serve
from hecompile.runtime.worker.worker import Worker


class FixedReplyEngine:
    """Check a request, multiply nothing, and return the same array each time, which is no right answer."""

    name = "fixed-reply"

    def __init__(self, bundle: WorkerBundle) -> None:
        self._bundle = bundle
        self._replies: dict[tuple[str, int], np.ndarray] = {}

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        """Return uint8 [reply_bytes, T, out], uniform, for uint8 [limbs, T, in]. Raises WorkerError as every engine does."""
        spec = check_request(self._bundle, circuit, planes)
        tokens = planes.shape[1]
        reply = self._replies.get((circuit, tokens))
        if reply is None:
            shape = (spec.reply_bytes, tokens, spec.out_features)
            reply = np.random.default_rng(tokens).integers(0, 256, shape, dtype=np.uint8)
            self._replies[circuit, tokens] = reply
        return reply


def main() -> None:
    """Serve what the command line names."""
    bundle, own = WorkerBundle.open(sys.argv[1]), None
    if len(sys.argv) > 3:
        folder = Path(sys.argv[3])
        own = ServerCredentials.load(folder / SERVER, folder / SERVER_KEY, tokens=folder / TOKEN)
    serve(
        Worker(bundle, FixedReplyEngine(bundle)),
        sys.argv[2],
        ready=lambda address: emit("listening", address=address),
        credentials=own,
    )


if __name__ == "__main__":
    main()
