"""Define the base of every section of a recipe."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Hold a mapping of the YAML file: unknown keys are refused, and nothing changes after it was read.

    command: of `hecompile`, for a section that is a whole recipe.
    """

    command: ClassVar[str] = ""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
