"""Tell which quantised checkpoints are read, and refuse the others by the name of what quantised them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hecompile.checkpoint.values import show
from hecompile.errors import InputError

SUPPORTED_METHODS = ("bitsandbytes",)
_REMEDY = (
    "export the model that it was made of, or let transformers dequantize() it where its library runs, and save that"
)


def check_quantisation(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights are quantised in a way that is not read. Raises InputError naming the method.

    path: of the configuration. What bitsandbytes has quantised says everything of itself in the weights' files.
    """
    for key in ("quantization_config", "compression_config"):
        section = config.get(key)
        if section is None:
            continue
        method = section.get("quant_method") if isinstance(section, Mapping) else section
        if (
            method is None
            and isinstance(section, Mapping)
            and (section.get("load_in_4bit") or section.get("load_in_8bit"))
        ):
            method = "bitsandbytes"  # which older files do not name
        if not isinstance(method, str) or method not in SUPPORTED_METHODS:
            supported = f"weights in float32, float16 or bfloat16, or quantised by {', '.join(SUPPORTED_METHODS)}"
            raise InputError(
                f"{path}: {key} says that the weights are quantised ({show(method)}); supported: {supported}; {_REMEDY}"
            )
