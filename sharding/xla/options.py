"""Compiler options for a training step on a topology, from `options.toml`, which has the source of each."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..hardware.topology import Topology

_FACTS = Path(__file__).with_name("options.toml")

Options = Mapping[str, bool | int | str]


def options_for(topology: Topology) -> dict[str, bool | int | str]:
    """Return the options with which a step for `topology` is compiled; empty means the compiler's defaults.

    >>> options_for(Topology.parse("v5e:16x16"))
    {}
    """
    facts = _facts()
    return {
        name: value
        for chosen in facts["chips"].get(topology.chip.name, ())
        for name, value in facts["sets"][chosen]["options"].items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A set of options worth trying.

    `ran` says whether devices have run it, by its sources; `scheduled` whether the compiler's schedule shows
    all that it does, before machine code is made.
    """

    name: str
    options: Options
    ran: bool
    scheduled: bool = False


def trials_for(topology: Topology, jaxlib: str | None = None) -> list[Trial]:
    """Return the sets of options worth compiling a step for `topology` with, one at a time.

    Those whose names the compilers of this jaxlib, by default the installed one, refuse are left out.

    >>> [trial.name for trial in trials_for(Topology.parse("v5e:16x16"))]
    ['async_collectives', 'scheduler_memory']
    >>> [trial.name for trial in trials_for(Topology.parse("h100:4x8"), "0.11.2")]
    ['combined_collectives', 'buffered_loops']
    """
    facts, here = _facts(), _installed() if jaxlib is None else jaxlib
    return [
        Trial(
            name=name,
            options=dict(one["options"]),
            ran=one["ran"],
            scheduled=one.get("scheduled", False),
        )
        for name in facts["trials"].get(topology.chip.name, ())
        if not _refused(one := facts["sets"][name], here)
    ]


def check_options(options: Mapping[str, Any], jaxlib: str | None = None) -> None:
    """Raise UserError for an option that the compilers of this jaxlib, by default the installed one, refuse.

    Only of names in `options.toml` is it known since when; XLA itself tells of others.
    """
    here = _installed() if jaxlib is None else jaxlib
    for one in _facts()["sets"].values():
        for name in one["options"].keys() & options.keys() if _refused(one, here) else ():
            raise UserError(
                f"compiler_options: {name} is refused by the compilers of jaxlib {here}, from {one['until']} "
                "on; plan again with this version, or leave it out of the plan"
            )


def _installed() -> str:
    return metadata.version("jaxlib")


def _refused(one: Mapping[str, Any], jaxlib: str) -> bool:
    return "until" in one and _numbers(jaxlib) >= _numbers(one["until"])


def _numbers(version: str) -> list[int]:
    return [int(part) for part in itertools.takewhile(str.isdigit, version.split("."))]


def options_to_trace(topology: Topology) -> dict[str, str | bool]:
    """Return the options with which a step is compiled so that a trace of it tells its operations apart.

    Empty where any program's trace does.

    >>> options_to_trace(Topology.parse("h100:8"))
    {'xla_gpu_enable_command_buffer': ''}
    """
    facts = _facts()
    name = facts["traced"].get(topology.chip.platform)
    return dict(facts["sets"][name]["options"]) if name is not None else {}


def scatters_over_several_axes(options: Mapping[str, Any]) -> bool:
    """Whether a program compiled with `options` scatters a gradient over several torus axes at once."""
    return any(
        one.get("scatters_over_several_axes", False) and _holds(one, options)
        for one in _facts()["sets"].values()
    )


def product_cycles(options: Mapping[str, Any], topology: Topology, usual: float) -> float:
    """Return the share of products' estimated cycles that schedules take under `options`, by default `usual`.

    >>> product_cycles({"xla_tpu_scoped_vmem_limit_kib": 98304}, Topology.parse("v6e:16x16"), usual=0.8)
    1.0
    """
    facts = _facts()
    sets = [facts["sets"][name] for name in facts["trials"].get(topology.chip.name, ())]
    shares = [one["product_cycles"] for one in sets if "product_cycles" in one and _holds(one, options)]
    return max(shares, default=usual)


def _holds(one: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Whether `options` include a set's: each flag equal, each size at least as large."""

    def holds(name: str, wanted: bool | int) -> bool:
        given = options.get(name)
        if isinstance(wanted, bool):
            return given == wanted
        return given is not None and int(given) >= wanted

    return all(holds(name, wanted) for name, wanted in one["options"].items())


@functools.cache
def _facts() -> Mapping[str, Any]:
    return tomllib.loads(_FACTS.read_text(encoding="utf-8"))
