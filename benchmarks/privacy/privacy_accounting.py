"""Measure without training: the accountant beside Opacus', DP-LoRA as published, and the price of gradients per example."""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import numpy as np
import torch

from benchmarks.report import table
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.privacy.accountant import Mechanism, spent_epsilon
from hecompile.runtime.privacy.clipping import Grid, add_noise, clipped_sum
from hecompile.runtime.privacy.paper_mode import paper_epsilon, paper_mechanism, paper_noise

REPEATS = 7
EVENTS = ((1.1, 0.25, 40, 1e-4), (0.8, 0.02, 1000, 1e-5), (2.0, 1.0, 50, 1e-5), (4.0, 0.1, 3000, 1e-6))
"""Noise multiplier, sampling rate, releases, δ."""
PRICE = """\
**What it takes.** Beside the gradient of a batch of {rows} lines (plaintext PEFT, medians of {repeats}): the gradients of
each line in one pass take {ratio:.2f} times as long, clipping them on the grid {clip:.2f} times, and the noise for
{parameters} parameters, once a step, {noise:.2f} times.
"""
ACCOUNTING = """\
**The accountant** (dp-accounting's privacy loss distributions) beside Opacus' for some runs: ε at δ. Opacus' PRV
accountant is asked for an error of 0.01; RDP is an upper bound.
"""
PAPER = """\
**DP-LoRA as published** (`mode: paper`): what its formula says and what {steps} steps at its noise really spend at δ =
{delta:g} (sensitivity 2√2·C; Poisson samples of rate {rate:g}, and without counting on sampling, as published).
"""


def price(model: PlaintextPeftModel, batch: dict[str, Any], quick: bool) -> str:
    """Return Markdown: seconds of a private step's parts over those of the gradient of `batch`."""
    repeats = 1 if quick else REPEATS
    parameters, grid = model.adapter_state(), Grid.of(1.0, 1.0)
    taken: dict[str, list[float]] = {name: [] for name in ("batch", "each", "clip", "noise")}
    for _ in range(repeats + 1):  # the first is to warm up
        marks = [time.perf_counter()]
        torch.autograd.grad(model(**batch).loss, list(parameters.values()))
        marks.append(time.perf_counter())
        gradients = model.per_example_gradients(**batch).of_means()
        marks.append(time.perf_counter())
        sums = clipped_sum(gradients, grid)
        marks.append(time.perf_counter())
        add_noise(sums, 1.0)
        marks.append(time.perf_counter())
        for name, seconds in zip(taken, np.diff(marks), strict=True):
            taken[name].append(float(seconds))
    middle = {name: statistics.median(values[1:]) for name, values in taken.items()}
    return PRICE.format(
        rows=len(batch["labels"]), ratio=middle["each"] / middle["batch"], repeats=repeats,
        clip=middle["clip"] / middle["batch"], noise=middle["noise"] / middle["batch"],
        parameters=sum(value.numel() for value in parameters.values()),
    )  # fmt: skip


def accountants(quick: bool) -> str:
    """Return Markdown: ε by three accountants."""
    from opacus.accountants import PRVAccountant, RDPAccountant

    rows: list[list[object]] = []
    for noise, rate, releases, delta in EVENTS[: 1 if quick else None]:
        prv, rdp = PRVAccountant(), RDPAccountant()
        prv.history = rdp.history = [(noise, rate, releases)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = [prv.get_epsilon(delta, eps_error=0.01, delta_error=delta / 1000), rdp.get_epsilon(delta)]
        ours = spent_epsilon([(Mechanism(noise, rate), releases)], delta)
        rows.append([noise, rate, releases, f"{delta:g}", *(f"{value:.4f}" for value in (ours, *theirs))])
    headings = ["noise multiplier", "sampling rate", "releases", "δ", "ours", "Opacus PRV", "Opacus RDP"]
    return "\n\n".join([ACCOUNTING, table(headings, rows)])


def published(steps: int = 50, rate: float = 0.1, delta: float = 1e-5) -> str:
    """Return Markdown: the paper's ε and the real one."""
    rows: list[list[object]] = []
    for epsilon in (0.5, 1.0, 2.0, 4.0):
        noise = paper_noise(epsilon, delta)
        spent = [spent_epsilon([(paper_mechanism(noise, sampled), steps)], delta) for sampled in (rate, 1.0)]
        rows.append([f"{paper_epsilon(noise, delta):g}", f"{noise:.2f}", *(f"{value:.1f}" for value in spent)])
    headings = ["ε by the formula, per iteration", "noise", "really spent, sampled", "really spent, not sampled"]
    return "\n\n".join([PAPER.format(steps=steps, delta=delta, rate=rate), table(headings, rows)])
