"""Measure how far values leave a domain, for range losses."""

from __future__ import annotations

import torch
from torch import Tensor


def beyond(magnitude: Tensor, bound: float) -> Tensor:
    """Mean square of |x|/bound - 1 where that is positive."""
    return torch.relu(magnitude / bound - 1).pow(2).mean()


def outside(values: Tensor, lower: float, upper: float) -> Tensor:
    """Mean square of the logarithm of the factor by which positive values are outside."""
    logarithm = torch.log(values.clamp_min(torch.finfo(values.dtype).tiny))
    above = torch.relu(logarithm - torch.log(torch.tensor(upper)))
    below = torch.relu(torch.log(torch.tensor(lower)) - logarithm)
    return (above.pow(2) + below.pow(2)).mean()
