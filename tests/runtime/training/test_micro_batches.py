"""Cut a step, sum its gradients in order and draw its seeds, without any worker."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from hecompile.runtime.training.micro_batches import MicroBatches, cut


class Linear:
    """Provide the least that MicroBatches needs of a model: float32 parameters."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(5, 3, generator=generator))
        self.unused = torch.nn.Parameter(torch.zeros(2))

    def adapter_state(self) -> dict[str, torch.nn.Parameter]:
        return {"weight": self.weight, "unused": self.unused}

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        noise = torch.rand(batch["x"].shape, generator=generator)
        return ((batch["x"] * noise) @ self.weight).square().sum()


def batch(rows: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(rows, 5, generator=generator), "y": torch.arange(rows)}


def test_cut_keeps_rows_in_order_and_copies_nothing() -> None:
    whole = batch()
    pieces = cut(whole, 3)
    assert [len(piece["x"]) for piece in pieces] == [3, 3, 1]
    for name, value in whole.items():
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), value)
        assert pieces[0][name].data_ptr() == value.data_ptr()


def run(in_flight: int, model: Linear, order: list[int] | None = None) -> Tensor:
    """Take one step; with `order`, micro-batch order[k] ends k-th."""
    turn, ended = threading.Condition(), 0
    pieces = cut(batch(), 2)
    position = {int(piece["y"][0]): index for index, piece in enumerate(pieces)}

    def loss_of(piece: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        nonlocal ended
        loss = model.loss(piece, generator)
        if order is not None:
            with turn:
                assert turn.wait_for(lambda: order[ended] == position[int(piece["y"][0])], timeout=60)
                ended += 1
                turn.notify_all()
        return loss

    torch.manual_seed(3)
    micro_batches = MicroBatches(in_flight)
    total = micro_batches.run(model, pieces, loss_of)  # type: ignore[arg-type]
    micro_batches.close()
    assert in_flight > 1 or micro_batches.overlapped_seconds == 0
    return total


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [1, 0, 3, 2], [0, 1, 2, 3]])
def test_the_sum_does_not_depend_on_which_ends_first(order: list[int]) -> None:
    sequence, flight = Linear(), Linear()
    expected, actual = run(1, sequence), run(4, flight, order)
    assert torch.equal(actual, expected) and not actual.requires_grad
    assert sequence.weight.grad is not None and flight.weight.grad is not None
    assert torch.equal(flight.weight.grad, sequence.weight.grad)
    assert flight.unused.grad is None


def test_gradients_add_to_those_that_are_there() -> None:
    model, fresh = Linear(), Linear()
    model.weight.grad = torch.ones(5, 3)
    run(1, model)
    run(1, fresh)
    assert fresh.weight.grad is not None
    assert torch.equal(model.weight.grad, 1 + fresh.weight.grad)


def test_the_step_is_that_of_the_sum_of_the_losses() -> None:
    model, reference = Linear(), Linear()
    total = run(2, model)
    torch.manual_seed(3)
    generators = [torch.Generator().manual_seed(seed) for seed in torch.randint(2**62, (4,)).tolist()]
    losses = [reference.loss(piece, each) for piece, each in zip(cut(batch(), 2), generators, strict=True)]
    sum(losses, torch.zeros(())).backward()
    torch.testing.assert_close(total, sum(losses, torch.zeros(())).detach())
    assert reference.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, reference.weight.grad)


def test_each_step_draws_other_seeds() -> None:
    model, micro_batches, drawn = Linear(), MicroBatches(1), []

    def loss_of(piece: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        drawn.append(generator.initial_seed())
        return model.loss(piece, generator)

    for _ in range(2):
        micro_batches.run(model, cut(batch(), 2), loss_of)  # type: ignore[arg-type]
    assert len(set(drawn)) == len(drawn) == 8
