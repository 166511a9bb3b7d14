"""Answer prompts from start to end: open a session, load the adapter, generate, and count what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hecompile.runtime.client.session import open_session
from hecompile.runtime.inference.answers import Prompt, Reply, infer, require_free
from hecompile.runtime.inference.generation import Sampling
from hecompile.runtime.model.adapter import load_adapter
from hecompile.runtime.recipes.workplace import Workplace


@dataclass(frozen=True)
class InferenceResult:
    """Hold the replies to all prompts, in their order, and what they took.

    Attributes:
        seconds: from the first prompt to the last reply, without opening the session.
        bytes_per_token: sent and received, per token that the model computed.
    """

    replies: tuple[Reply, ...]
    seconds: float
    bytes_per_token: float

    @property
    def tokens(self) -> int:
        """Return how many tokens were written."""
        return sum(reply.tokens for reply in self.replies)

    @property
    def compared(self) -> int:
        """Return how many replies had a completion to be compared with."""
        return sum(reply.match is not None for reply in self.replies)

    @property
    def matches(self) -> int:
        """Return how many replies are exactly their completion."""
        return sum(reply.match is True for reply in self.replies)


def run_inference(
    place: Workplace,
    adapter: Path | None,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling,
    out: Path | None = None,
    on_reply: Callable[[int, Reply], None] = lambda number, reply: None,
) -> InferenceResult:
    """Answer `prompts` where `place` says, with the PEFT adapter in `adapter` if there is one.

    `out` and `on_reply` are those of `hecompile.runtime.inference.answers.infer`. An interrupt with `out` says that the
    answers are kept. Raises HecompileError as opening a session, loading an adapter and inference do.
    """
    if out is not None:
        require_free(out)  # before a worker is asked for anything
    with open_session(place) as session:
        if adapter is not None:
            load_adapter(session.model, adapter)
        started = time.perf_counter()
        try:
            replies = infer(session, prompts, max_new_tokens, sampling, out, on_reply)
        except KeyboardInterrupt:
            if out is None:
                raise
            raise KeyboardInterrupt("the answers that are there are kept: the same command goes on from them") from None
        seconds, stats = time.perf_counter() - started, session.model.stats()
    wire = stats["bytes_up"] + stats["bytes_down"]
    return InferenceResult(tuple(replies), seconds, wire / max(1.0, stats["tokens"]))
