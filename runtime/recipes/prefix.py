"""Define the recipe's section on what is kept of the layers below the lowest adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hecompile.runtime.recipes.section import Section, Size


class PrefixCacheSection(Section):
    """Keep what the layers that no adapter changes make of each example, so that it is sent once and not in each epoch.

    * `size`: bytes for all that is kept, such as `2GB`. Examples for which there is no room are computed again.
    * `directory`: a folder on disk for it, encrypted under a key in memory; without it, it stays in memory.
    * `dtype`: how numbers are kept. With `float32` gradients are those of a run without it.
    """

    size: Annotated[Size, Field(gt=0)]
    directory: Path | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
