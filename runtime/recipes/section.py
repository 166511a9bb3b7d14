"""Define the base of every section of a recipe."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]

_SIZE = re.compile(r"\s*\d+(\.\d+)?\s*([kKMGT]i?)?[bB]?\s*")


def _check_size(value: object) -> object:
    if isinstance(value, bool) or not _SIZE.fullmatch(str(value)):
        raise ValueError("must be a number of bytes, such as 2GB or 500MB")
    return value


Size = Annotated[ByteSize, BeforeValidator(_check_size)]
"""A number of bytes, such as 2GB."""


class Section(BaseModel):
    """Hold a mapping of the YAML file: unknown keys are refused, and nothing changes after it was read.

    command: of `hecompile`, for a section that is a whole recipe.
    """

    command: ClassVar[str] = ""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
