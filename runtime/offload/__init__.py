"""Compute the frozen linears of a user's own transformers model on the encrypted worker."""

from hecompile.runtime.offload.offload import Offload, offload

__all__ = ["Offload", "offload"]
