"""Split the CPU seconds of a training process by part: each operator's, forward and backward, cryptography, head, optimizer.

Identities around an operator switch the clock in both directions: the backward of the one behind it runs before the
operator's own, that of the ones in front of it afterwards. So whatever runs between two switches counts for one part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import hecompile.runtime.client.encrypted_model as encrypted_model
import hecompile.runtime.client.products as products
import hecompile.runtime.model.plaintext as plaintext
from hecompile.graph.ir import DOMAIN
from hecompile.graph.operators import OPERATORS, Operator

CRYPTOGRAPHY, WIRE, ATTENTION, NORMS = "cryptography", "serialisation", "attention and rotary", "norms and SwiGLU"
LORA, GRAPH, HEAD, HEAD_CRYPTOGRAPHY = "LoRA", "rest of the graph", "head and loss", "cryptography and bytes of the head"
OPTIMIZER, REST = "optimizer", "rest"
PARTS = (CRYPTOGRAPHY, WIRE, ATTENTION, NORMS, LORA, GRAPH, HEAD, HEAD_CRYPTOGRAPHY, OPTIMIZER, REST)
OUTSIDE_LAYERS = (HEAD, HEAD_CRYPTOGRAPHY, REST)
"""Parts of a client that do not grow with the number of layers. The rest of plaintext training is its layers."""

_PART_OF = {
    "RMSNorm": NORMS, "SwiGLU": NORMS, "SiLU": NORMS, "Lora": LORA, "GatedLora": LORA, "Attention": ATTENTION,
    "RotaryEmbedding": ATTENTION, "RepeatKV": ATTENTION, "Transpose": ATTENTION, "Reshape": ATTENTION,
}  # fmt: skip


class PartClock:
    """Add up the CPU seconds of all threads of this process by the part that its training thread is at."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.now = REST
        self._since = time.process_time()

    def switch(self, part: str) -> None:
        """Count for `part` from here on."""
        time_now = time.process_time()
        self.seconds[self.now] += time_now - self._since
        self.now, self._since = part, time_now

    @contextmanager
    def at(self, part: str) -> Iterator[None]:
        """Count for `part` inside, and for what was before afterwards."""
        before = self.now
        self.switch(part)
        try:
            yield
        finally:
            self.switch(before)

    def take(self) -> dict[str, float]:
        """Return the seconds so far, and begin anew."""
        self.switch(self.now)
        seconds, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return seconds

    def watch(self) -> None:
        """Count what models opened from now on compute, in this process and for good."""
        for (domain, name), function in OPERATORS.items():
            standard = name in ("Transpose", "Reshape") or domain == DOMAIN
            OPERATORS[domain, name] = self._operator(function, _PART_OF.get(name, GRAPH) if standard else GRAPH)
        self._replace(products, "encrypt_reals", lambda: self._of_product(CRYPTOGRAPHY))
        self._replace(products, "decrypt_reals", lambda: self._of_product(CRYPTOGRAPHY))
        self._replace(products.EncryptedProducts, "_ask", lambda: self._of_product(WIRE))
        self._replace(encrypted_model, "head_cross_entropy", lambda: HEAD)
        self._replace(plaintext, "linear_cross_entropy", lambda: HEAD)
        self._replace(torch.optim.AdamW, "step", lambda: OPTIMIZER)

    def _of_product(self, part: str) -> str:
        return HEAD_CRYPTOGRAPHY if self.now == HEAD else part

    def _replace(self, owner: Any, name: str, part: Callable[[], str]) -> None:
        function = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            with self.at(part()):
                return function(*arguments, **options)

        setattr(owner, name, counted)

    def _operator(self, function: Operator, part: str) -> Operator:
        def counted(context: Any, attributes: Any, *inputs: Any) -> Any:
            with self.at(part):
                results = function(context, attributes, *(self._mark(value, GRAPH) for value in inputs))
                if isinstance(results, tuple):
                    return tuple(self._mark(value, part) for value in results)
                return self._mark(results, part)

        return counted

    def _mark(self, value: Any, part: str) -> Any:
        if isinstance(value, Tensor) and value.requires_grad:
            return _Switch.apply(value, self, part)
        return value


class _Switch(torch.autograd.Function):
    """Return the tensor as it is; backward, switch the clock."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, clock: PartClock, part: str) -> Tensor:
        ctx.clock, ctx.part = clock, part
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None, None]:
        ctx.clock.switch(ctx.part)
        return gradients[0], None, None
