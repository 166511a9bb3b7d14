"""Name the functions that a model, a plan or a recipe may have for attention, norm and activation."""

from __future__ import annotations

from typing import Any, Final

EXACT: Final = "exact"
"""No polynomial: softmax, RMSNorm or SiLU itself."""

_FORMER_NAMES = {"attention": "softmax", "norm": "rmsnorm", "activation": "silu"}


def current_name(part: str, name: Any) -> Any:
    """Return `name`, or "exact" for what older recipes and scripts call softmax, rmsnorm and silu.

    Args:
        part: "attention", "norm" or "activation".
        name: as given; anything but the former name of that part is returned as it is, to be checked by the caller.
    """
    return EXACT if name == _FORMER_NAMES[part] else name
