"""The base of every section of the config."""

from __future__ import annotations

import pydantic


class Section(pydantic.BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True)
