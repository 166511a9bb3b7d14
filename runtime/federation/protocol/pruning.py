"""Prune LoRA matrices by magnitude, as FedShield-LLM does (Mia, Amini, arXiv 2506.05640), with the mask made public.

    shared       mask = the (1 - rate) largest |w| of every matrix of the previous global adapter; all compute the same one,
                 train within it, and send the coordinates it keeps
    per client   w_k ← w_k · (the (1 - rate) largest |w_k| of every matrix), after training; all coordinates are sent

The published form encrypts the zeros, so that pruning saves no bytes, and averages over them: a coordinate that one of K
owners keeps comes out divided by K. With the shared mask a coordinate is kept by all or by none, and one that is pruned
stays so while the rate rises, for zero is the smallest. The mask is a function of the global adapter alone, which all
have, the server too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hecompile.runtime.federation.protocol.layout import Layout


def shared_mask(layout: Layout, adapter: NDArray[np.float32], rate: float, freeze_a: bool) -> NDArray[np.bool_]:
    """Return which coordinates are trained and sent: bool `[size]`.

    `freeze_a` leaves out all of A (FFA-LoRA; Sun et al., ICLR 2024). A matrix of zeros, such as B before the first round,
    is not pruned: its coordinates have no order yet. Equal magnitudes are kept in the order of their places.
    """
    mask = np.ones(layout.size, dtype=bool)
    for name, where in layout.slices():
        if freeze_a and is_a(name):
            mask[where] = False
        elif adapter[where].any():
            mask[where] = largest(adapter[where], rate)
    return mask


def prune_client(layout: Layout, weights: NDArray[np.float32], rate: float) -> NDArray[np.float32]:
    """Set the smallest `rate` of each matrix of one owner's trained weights to zero, as published: float32 `[size]`."""
    pruned = weights.copy()
    for _, where in layout.slices():
        if weights[where].any():
            pruned[where] *= largest(weights[where], rate)
    return pruned


def largest(values: NDArray[np.float32], rate: float) -> NDArray[np.bool_]:
    """Select the ⌈(1 - rate)·n⌉ largest magnitudes: bool `[n]`."""
    keep = values.size - int(rate * values.size)
    order = np.argsort(-np.abs(values), kind="stable")
    mask = np.zeros(values.size, dtype=bool)
    mask[order[:keep]] = True
    return mask


def is_a(name: str) -> bool:
    """Return whether a matrix of the adapter is an A, by PEFT's names."""
    return ".lora_A." in name
