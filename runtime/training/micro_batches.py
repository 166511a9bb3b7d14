"""Compute a step's micro-batches, several in flight: while one waits for the worker, another does the client's work.

Each micro-batch is one forward and backward in one thread. Gradients are returned and not accumulated, and summed in the
order of the micro-batches whatever the order they came in. Each draws dropout from a generator of its own, seeded
beforehand in that order. So the result is a function of the batch alone, however many are in flight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from hecompile.runtime.model.adapter import AdapterModel

LossOf = Callable[[Mapping[str, Tensor], torch.Generator], Tensor]
"""A micro-batch and the generator of its dropout → its share of the step's loss, a scalar with a graph."""
Result = TypeVar("Result")


class MicroBatches:
    """Run the micro-batches of one step after another. `close` ends its threads.

    in_flight: how many at once; each holds its activations, so memory grows with it. One needs no thread.
    one_draw: take one number of torch's generator per step, not one per micro-batch. The generator's state, which a
        checkpoint holds, then does not tell how many micro-batches, and so how many examples, the steps had.
    overlapped_seconds: by how much the micro-batches so far took longer, added up, than the steps that they were in. It is
        0 in sequence: the client's, the wire's and the worker's seconds then add up to the step's.
    """

    def __init__(self, in_flight: int = 1, *, one_draw: bool = False) -> None:
        self.in_flight = in_flight
        self._one_draw = one_draw
        self.overlapped_seconds = 0.0
        # Threads that stay: each keeps its OpenMP team and its memory for the next step.
        self._threads = ThreadPoolExecutor(in_flight, "micro-batch") if in_flight > 1 else None

    def run(self, model: AdapterModel, micro_batches: Sequence[Mapping[str, Tensor]], loss_of: LossOf) -> Tensor:
        """Add the gradients of Σ loss_of(micro-batch) to the parameters' `grad`; return that sum, a detached scalar.

        The generators' seeds are drawn from torch's own generator. If a micro-batch fails, those that have not started are
        dropped, those in flight end, the first failure is raised, and no `grad` is touched.
        """
        parameters = list(model.adapter_state().values())

        def work(
            micro_batch: Mapping[str, Tensor], generator: torch.Generator
        ) -> tuple[Tensor, Sequence[Tensor | None]]:
            loss = loss_of(micro_batch, generator)
            return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

        total = torch.zeros(())
        sums: list[Tensor | None] = [None] * len(parameters)
        for loss, gradients in self.map(work, micro_batches):
            total = total + loss
            for position, gradient in enumerate(gradients):
                sums[position] = _sum(sums[position], gradient)
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = _sum(parameter.grad, gradient)
        return total

    def map(
        self,
        work: Callable[[Mapping[str, Tensor], torch.Generator], Result],
        micro_batches: Sequence[Mapping[str, Tensor]],
    ) -> Iterator[Result]:
        """Yield work(micro-batch, generator of its dropout) of each in order, gradients enabled; see `run` for failures."""
        seeds = self._seeds(len(micro_batches))
        started, seconds = time.perf_counter(), 0.0

        def timed(index: int) -> tuple[Result, float]:
            begin = time.perf_counter()
            with torch.enable_grad():
                result = work(micro_batches[index], torch.Generator().manual_seed(seeds[index]))
            return result, time.perf_counter() - begin

        for result, taken in self._in_order(timed, len(micro_batches)):
            seconds += taken
            yield result
        if self._threads is not None:
            self.overlapped_seconds += max(0.0, seconds - (time.perf_counter() - started))

    def _seeds(self, count: int) -> list[int]:
        source = torch.default_generator
        if self._one_draw:
            source = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        seeds: list[int] = torch.randint(2**62, (count,), generator=source).tolist()
        return seeds

    def _in_order(self, work: Callable[[int], Result], count: int) -> Iterator[Result]:
        if self._threads is None:
            yield from (work(index) for index in range(count))
            return
        futures: list[Future[Result]] = [self._threads.submit(work, index) for index in range(count)]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            # A failed step must not go on behind the caller's back: its requests would mix with the next step's.
            for future in futures:
                if not future.cancelled():
                    future.exception()

    def close(self) -> None:
        """End the threads; those at work finish first."""
        if self._threads is not None:
            self._threads.shutdown()


def _sum(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if total is None or gradient is None:
        return total if gradient is None else gradient
    return total + gradient


def cut(batch: Mapping[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    """Cut a batch into pieces of `rows` rows, in order; the last piece may have fewer. Views, not copies."""
    count = len(next(iter(batch.values())))
    return [{name: value[at : at + rows] for name, value in batch.items()} for at in range(0, count, rows)]
