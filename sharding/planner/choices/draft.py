"""A layout in the making: what choices are made for, what was chosen so far, and what was refused."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from ...cost.candidate import Storage
from ...hardware.topology import Topology
from ...plans.vocabulary import ONE_BY_ONE
from ...program.dims import batch_rows
from ...program.program import Program
from ..declared import Declared, Kept
from .layers import Layers, layers_of
from .microbatches import PartsProof

_Found = TypeVar("_Found")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """What every choice is made for.

    `params` and `names` are the parameters' tree and the user's names of their dimensions, for rules.
    `proof` says in how many parts the batch can be worked through, `keeps` whether stages may hold what
    layers keep.
    """

    program: Program
    topology: Topology
    declared: Declared
    params: Any = None
    names: Any = None
    proof: PartsProof | None = None
    keeps: bool = False
    known: dict[object, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def once(self, key: object, make: Callable[[], _Found]) -> _Found:
        """Return what `make` gives, made once under `key`: what all drafts of one planning share."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    @functools.cached_property
    def rows(self) -> int:
        """Rows of the batch."""
        return batch_rows(self.program)

    @functools.cached_property
    def layers(self) -> Layers | None:
        """The layers that most parameters are stacked in."""
        return layers_of(self.program)

    @functools.cached_property
    def leads(self) -> tuple[int, ...]:
        """The dims that arrays of the data lead with and parameters lack, the batch's first."""
        of_data = dict.fromkeys(self.program.batch_dims[:1])
        for argument in self.program.arguments:
            lead = argument.dims[0][:1] if argument.is_data and argument.dims else ()
            of_data.update(dict.fromkeys(dim for dim in lead if dim in self.program.data_dims))
        return tuple(dim for dim in of_data if self.program.dims[dim].whole is None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """What was chosen so far; fields are those of a `Candidate`.

    `kept` is what the user's rules fix on the mesh, `group` the dims that were chosen for ``tensor``. With
    `storing` the axis ``fsdp`` only stores: the batch is too small to be cut over it.
    """

    storing: bool = False
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    kept: Kept = dataclasses.field(default_factory=Kept)
    batch: tuple[str, ...] = ()
    dims: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    group: tuple[int, ...] = ()
    stored: Mapping[int, Storage] = dataclasses.field(default_factory=dict)
    optimizer: Mapping[int, Storage] = dataclasses.field(default_factory=dict)
    schedule: str = ONE_BY_ONE
    interleave: int = 1
    stage_remat: bool = True
    context: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
    """What is not considered: sizes of mesh axes, and the reason."""

    sizes: Mapping[str, int]
    reason: str


# A choice: from what is given and what was chosen before it to each way on, or why there is none.
Choices = Callable[[Given, Draft], Iterator[Draft | Refused]]
