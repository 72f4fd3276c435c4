"""The base of every section of the config."""

from __future__ import annotations

import pydantic


class Section(pydantic.BaseModel):
    """A frozen group of settings that refuses keys it does not know and values of another type."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False
    )
