"""Give the formulas of DP-LoRA as published (Liu et al., arXiv 2312.17493), and what they are really worth.

The paper's noise comes from a condition per iteration: σ = √(2 ln(1.25/δ)) / ε (Dwork & Roth, theorem A.1, which holds for
ε < 1 and a sensitivity of one clipping norm). An example more or less turns the batch's clipped gradient from any vector of
norm at most C into any other: 2C for A and 2C for B, together 2√2·C, against noise of σC.
"""

from __future__ import annotations

import math

from hecompile.runtime.privacy.accountant import Mechanism

_SENSITIVITY = 2 * math.sqrt(2)


def paper_noise(epsilon: float, delta: float) -> float:
    """Return σ, the noise multiplier that the paper's formula gives to ε per iteration."""
    return math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def paper_epsilon(noise_multiplier: float, delta: float) -> float:
    """Return the ε per iteration that the paper's formula gives to a noise multiplier; infinity for none."""
    return math.sqrt(2 * math.log(1.25 / delta)) / noise_multiplier if noise_multiplier else math.inf


def paper_mechanism(noise_multiplier: float, sampling_rate: float) -> Mechanism:
    """Return what a step really is: noise of σC against a sensitivity of 2√2·C."""
    return Mechanism(noise_multiplier / _SENSITIVITY, sampling_rate)
