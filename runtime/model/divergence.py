"""Notice training that is no longer finite, and explain why.

A polynomial stands for a function on its domain only; outside it may grow without limit. So where a plan has polynomials,
the batch that failed runs forward once more, and the error names what left its domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hecompile.errors import NotFiniteError
from hecompile.polynomial.domains import DomainViolation

_SHOWN = 3


@runtime_checkable
class DomainModel(Protocol):
    """Mark an `AdapterModel` that may have polynomials in it."""

    def outside_domains(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> tuple[DomainViolation, ...]:
        """Find what leaves the domain of its polynomial when a batch (int64 [B, S] each, padded on the right) runs forward.

        It is listed in the order of the graph, up to the first value that is infinite or NaN; empty without polynomials. No
        gradient is made. `generator` draws LoRA's dropout.
        """


def require_finite_loss(loss: Tensor) -> None:
    """Raise NotFiniteError unless the scalar `loss` is finite."""
    if not torch.isfinite(loss):
        raise NotFiniteError(f"the loss is {loss.item()}")


def require_finite_gradients(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Raise NotFiniteError unless the gradients there are, and their norm over all parameters, are finite."""
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    if torch.isfinite(torch.nn.utils.get_total_norm(gradients.values())):
        return
    bad = next((name for name, value in gradients.items() if not torch.isfinite(value).all()), None)
    what = "the norm of the gradient" if bad is None else f"the gradient of {bad}"
    raise NotFiniteError(f"{what} is not finite")


def divergence_error(message: str, outside: Sequence[DomainViolation]) -> NotFiniteError:
    """Make the error `message` with what is known of why, and what to do.

    It shows ends of ranges of activations, and no other number of the text: they stay with the data owner, whose client
    raises it, and nobody can choose a rate or a margin without them. A federation sends none of it to the others. Under
    differential privacy it has no noise: it goes to the owner's terminal, which no promise covers, and into no file.
    """
    if not outside:
        return NotFiniteError(f"{message}. Try a lower learning_rate")
    causes = tuple(map(str, outside))
    more = f"; and {len(causes) - _SHOWN} more" if len(causes) > _SHOWN else ""
    margins = ", ".join(dict.fromkeys(f"{one.part}.margin" for one in outside[:_SHOWN]))
    return NotFiniteError(
        f"{message}. Values left the domains of the plan's polynomials, outside of which these grow without limit: "
        f"{'; '.join(causes[:_SHOWN])}{more}. Checkpoints are kept, of which the last may hold the weights that failed. "
        "Start again with a lower training.learning_rate or with range_loss, or convert the checkpoint for wider domains "
        f"({margins} in the recipe of `hecompile convert`) and export it again",
        causes,
    )
