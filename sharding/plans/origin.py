"""What a Plan remembers of its making: the program it is for, and the layouts that it was preferred to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from ..errors import UserError
from ..program.identity import primitive_counts
from ..program.jaxpr import Traced
from ..program.program import Program
from .estimate import Estimate
from .vocabulary import OF_STAGES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another way of running the program, at its best or as a bound on it, and one sentence why it lost.

    `sharded` maps dimension → mesh axes while computing, `storage` says how parameters and moments are
    stored (``replicated``, ``zero-1``, ``fsdp``, ``fsdp + zero-1``), `fits` whether memory holds it. Over
    stages `schedule`, `interleave` and `stage_remat` say how they work, as in a plan.
    """

    mesh: Mapping[str, int]
    sharded: Mapping[str, tuple[str, ...]]
    storage: str
    remat: str
    saved: Mapping[str, str]
    microbatches: int
    estimate: Estimate
    fits: bool
    lost: str
    schedule: str | None = None
    interleave: int = 1
    stage_remat: bool = True

    @property
    def way(self) -> tuple[str, int, bool] | None:
        """How its stages work, as a plan's; None without stages, and where that is not remembered."""
        return None if self.schedule is None else (self.schedule, self.interleave, self.stage_remat)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, without how stages work where there are none."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if self.way or name not in OF_STAGES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The program that a plan was made for: its fingerprint under a version of JAX, and what it consists of.

    `primitives` counts the equations that the user wrote by primitive, loops' bodies once.
    """

    fingerprint: str
    jax: str
    primitives: Mapping[str, int]

    @classmethod
    def of(cls, program: Program) -> Origin:
        """Return the origin that `program` is."""
        counts = primitive_counts(program.written)
        return cls(fingerprint=program.fingerprint, jax=jax.__version__, primitives=counts)

    def check(self, traced: Traced) -> None:
        """Raise UserError, naming what differs, if another program was traced.

        Versions of JAX trace a function differently, so that programs are compared under the same one only.
        """
        if jax.__version__ != self.jax or traced.fingerprint == self.fingerprint:
            return
        here = primitive_counts(traced.written or traced.jaxpr)
        names = sorted({*self.primitives, *here})
        differing = [
            f"{name} {here.get(name, 0)} times instead of {self.primitives.get(name, 0)}"
            for name in names
            if here.get(name, 0) != self.primitives.get(name, 0)
        ]
        what = "; ".join(differing[:3]) or "the same operations on other constants, shapes or orders"
        raise UserError(f"the plan was made for another program on the same arrays: this one has {what}")


def distinct(alternatives: Iterable[Alternative]) -> tuple[Alternative, ...]:
    """Return the first of those that share out the batch's axes differently and are alike in all else."""
    first: dict[tuple[Any, ...], Alternative] = {}
    for row in alternatives:
        others = tuple(item for item in row.mesh.items() if item[0] not in ("data", "fsdp"))
        first.setdefault((others, row.storage, row.remat, row.fits, row.way), row)
    return tuple(first.values())


def is_bound(row: Alternative) -> bool:
    """Whether a row's time bounds what its mesh can do, rather than being that of a layout that fits.

    Where the search need not work a size out, it gives the fastest layout with it whatever that holds: it
    does not fit, and is said to be slower all the same. What was worked out and does not fit is said so.
    """
    return not row.fits and not row.lost.startswith("does not fit")


def alternative_from(row: Mapping[str, Any]) -> Alternative:
    """Rebuild an Alternative from plain values."""
    sharded = {name: tuple(axes) for name, axes in row["sharded"].items()}
    return Alternative(**{**row, "sharded": sharded, "estimate": Estimate(**row["estimate"])})
