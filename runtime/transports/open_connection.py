"""Open a connection: check that both sides have the same plan, and that the worker's arithmetic is exact."""

from __future__ import annotations

import numpy as np

from hecompile.bundles.known_answer import KNOWN_ANSWER, known_answer_vector
from hecompile.errors import WorkerError
from hecompile.runtime.transports.base import Transport
from hecompile.runtime.wire.protocol import WorkerInfo


def open_connection(transport: Transport, plan_id: str) -> WorkerInfo:
    """Say hello and run the known-answer test; the transport may be used once this returns.

    The test runs for all its tokens and for the first alone: kernels for one row differ from those for several. Raises
    WorkerError, and closes the transport, when the plan differs or a single byte of the answers does.
    """
    try:
        info = transport.hello(plan_id)
        planes, expected = known_answer_vector(plan_id)
        for tokens in (planes.shape[1], 1):
            reply = transport.evaluate(KNOWN_ANSWER, planes[:, :tokens]).planes
            answer = expected[:, :tokens]
            if reply.shape != answer.shape or not np.array_equal(reply, answer):
                wrong = np.count_nonzero((reply != answer).any(axis=0)) if reply.shape == answer.shape else "all"
                raise WorkerError(
                    f"the worker (engine {info.engine}) computes wrongly: {wrong} of {answer[0].size} results of the "
                    "known-answer test differ. Its machine saturates sums of 8-bit products (x86 without VNNI) or "
                    "accumulates in floating point; run the worker with another engine or on another machine"
                )
    except WorkerError:
        transport.close()
        raise
    return info
