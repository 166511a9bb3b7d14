"""Penalise inputs of polynomials that leave a range.

    Loss = α·L_range + β·L_var + L                       (Zimerman et al., Power-Softmax, arXiv 2410.09457)

L_range is the sum over attentions and activations, L_var over norms, of mean squares: of |x|/bound - 1 for the largest |x|
of a token (activations) or query (scores, exponents), of the logarithm of the factor for divisors and variances, which are
positive and spread over decades. Inside the range the terms and their gradients are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hecompile.polynomial.inputs import AttentionInputs


class RangeTerms:
    """Sum the terms of a range loss over the nodes of one run: `range_term` and `variance_term`, scalars with a graph.

    A packed sequence counts by its share of the positions.
    """

    def __init__(self) -> None:
        self.range_term, self.variance_term = torch.zeros(()), torch.zeros(())

    def loss(self, alpha: float, beta: float) -> Tensor:
        """Return α·L_range + β·L_var."""
        return alpha * self.range_term + beta * self.variance_term

    def add_scores(self, inputs: AttentionInputs, scores: Tensor, bound: float) -> None:
        """Penalise |scores| above `bound`; `scores` are those of `inputs`, or these less the middle of their domain."""
        self._add(inputs.share * square_above((scores * inputs.mask).abs().amax(-1), bound))

    def add_exponents(self, inputs: AttentionInputs, bound: float) -> None:
        """Penalise exponents of a Gaussian kernel under -`bound`."""
        self._add(inputs.share * square_above((-inputs.exponents.clamp_max(0.0) * inputs.mask).amax(-1), bound))

    def add_divisors(self, inputs: AttentionInputs, divisors: Tensor, lower: float, upper: float) -> None:
        """Penalise divisors of a power attention outside of [lower, upper]."""
        self._add(inputs.share * square_log_outside(divisors, lower, upper))

    def add_activations(self, x: Tensor, bound: float) -> None:
        """Penalise |x| above `bound`."""
        self._add(square_above(x.abs().amax(-1), bound))

    def add_variances(self, variances: Tensor, lower: float, upper: float) -> None:
        """Penalise variances outside of [lower, upper]."""
        self.variance_term = self.variance_term + square_log_outside(variances, lower, upper)

    def _add(self, term: Tensor) -> None:
        self.range_term = self.range_term + term


def square_above(magnitude: Tensor, bound: float) -> Tensor:
    """Return the mean square of magnitude/bound - 1 where that is positive."""
    return torch.relu(magnitude / bound - 1).pow(2).mean()


def square_log_outside(values: Tensor, lower: float, upper: float) -> Tensor:
    """Return the mean square of the logarithm of the factor by which positive values are outside of [lower, upper]."""
    logarithm = torch.log(values.clamp_min(torch.finfo(values.dtype).tiny))
    above = torch.relu(logarithm - torch.log(torch.tensor(upper)))
    below = torch.relu(torch.log(torch.tensor(lower)) - logarithm)
    return (above.pow(2) + below.pow(2)).mean()
