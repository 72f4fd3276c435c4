"""The compiler's options for a training step on a topology: data, with where each was read."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..topology import Topology

_FACTS = Path(__file__).with_name("options.toml")

Options = Mapping[str, bool | int | str]


def options_for(topology: Topology) -> dict[str, bool | int | str]:
    """Return the options to compile a step for `topology` with; none where the compiler's defaults serve.

    >>> options_for(Topology.parse("v5e:16x16"))
    {}
    """
    facts = _facts()
    return {
        name: value
        for chosen in facts["chips"].get(topology.chip.name, ())
        for name, value in facts["sets"][chosen]["options"].items()
    }


def scatters_over_several_axes(options: Mapping[str, Any]) -> bool:
    """Whether a program compiled with `options` scatters a gradient over several torus axes at once."""
    return any(
        one.get("scatters_over_several_axes", False)
        and all(options.get(name) == value for name, value in one["options"].items())
        for one in _facts()["sets"].values()
    )


@functools.cache
def _facts() -> Mapping[str, Any]:
    return tomllib.loads(_FACTS.read_text(encoding="utf-8"))
