"""A layout in the making: what choices are made for, what was chosen so far, and what was refused."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from ...cost.candidate import Storage
from ...hardware.topology import Topology
from ...program.program import Program
from ..declared import Declared, Kept
from .microbatches import PartsProof, batch_rows

_Found = TypeVar("_Found")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """The dimension of the layers that most parameters are stacked in; by the program if `written_out`."""

    dim: int
    name: str
    count: int
    written_out: bool = False


def _layers(program: Program) -> Layers | None:
    """Return the layers that hold most parameters, None for a program without a scan over stacked ones."""
    sizes = {dim.id: 0 for dim in program.dims if dim.stacked}
    for argument in program.parameters:
        for dim in {dim for composition in argument.dims for dim in composition}.intersection(sizes):
            sizes[dim] += math.prod(argument.shape)
    for stack in program.stacks:
        if stack.dim in sizes:
            sizes[stack.dim] += sum(math.prod(program.arguments[index].shape) for index in stack.arguments)
    if not any(sizes.values()):
        return None
    most = program.dims[max(sizes, key=lambda dim: (sizes[dim], -dim))]
    return Layers(dim=most.id, name=most.name, count=most.size, written_out=not most.places)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """What every choice is made for.

    `params` and `names` are the parameters' tree and the user's names of their dimensions, for rules.
    `proof` says in how many parts the batch can be worked through.
    """

    program: Program
    topology: Topology
    declared: Declared
    params: Any = None
    names: Any = None
    proof: PartsProof | None = None
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
        return _layers(self.program)

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
    schedule: str = "1f1b"
    interleave: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
    """What is not considered: sizes of mesh axes, and the reason."""

    sizes: Mapping[str, int]
    reason: str


# A choice: from what is given and what was chosen before it to each way on, or why there is none.
Choices = Callable[[Given, Draft], Iterator[Draft | Refused]]
