"""Where the first value of a loss is that is not finite: looked for on demand, with one layer at a time.

The loss is worked through as planned, gradients too, in a program of its own: the one that trains has nothing
of it. A plan without stages is taken as one of a single stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from ..errors import UserError
from ..hardware.axes import AXES
from ..paths import by_path, folders_of
from ..plans import arrays
from ..plans.record import Decision, Record
from ..program.jaxpr import Traced
from ..program.tracing import read
from .compose import PlannedLoss
from .meshes import automatic, of_plan
from .pipeline.layers import stacked_parameters, stacks_of
from .pipeline.prepare import prepared
from .pipeline.schedule import BACKWARD, EMBED, FORWARD, HEAD, LEARN, WEIGHTS
from .pipeline.slots import STAGE
from .pipeline.watch import BEHIND_SUMS, Fault, Numbering, are_finite
from .said import OF_LOSS, check_given

_WORDS = {
    EMBED: "what comes before the layers",
    FORWARD: "the forward pass",
    HEAD: "what comes after the layers (head and loss), or its gradient",
    BACKWARD: "the backward pass",
    WEIGHTS: "the gradient of the layers' weights",
    LEARN: "the gradient of what comes before the layers",
}
# Paths that are named.
_NAMED = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstNotFinite:
    """Where the first value of a loss or its gradients is that is not finite.

    Attributes:
        arrays: kind (``parameter``, ``batch array``, ``state array``) → paths of those that have such values
            to begin with; then nothing else is looked at.
        fault: the work of a microbatch, None where all of it is finite.
        behind: whether it is in what is worked out of sums over the whole batch, such as their quotient.
        stacks: of each stack of layers that was looked at, as they run, what its parameters' paths have in
            common → its layers.
        microbatches, stages, chunks: how many there are.
        refused: why no layer was looked at, None where they were.
    """

    arrays: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    fault: Fault | None = None
    behind: bool = False
    stacks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    microbatches: int = 1
    stages: int = 1
    chunks: int = 1
    refused: str | None = None

    def __str__(self) -> str:
        if self.arrays:
            kind, paths = next(iter(self.arrays.items()))
            more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
            return f"the {kind} {', '.join(paths[:_NAMED])}{more} is not finite to begin with"
        if self.refused is not None:
            return f"no layer was looked at: {self.refused}"
        if self.behind:
            return (
                "every part of the batch is finite; what is worked out of sums over the batch, such as the "
                "quotient of two, is not"
            )
        if self.fault is None:
            return "every value and gradient is finite where one layer at a time is run"
        return f"the first value that is not finite is in {self._words(self.fault)}"

    @property
    def layers(self) -> int:
        """How many layers were looked at."""
        return sum(self.stacks.values())

    def _words(self, fault: Fault) -> str:
        words, names = [_WORDS[fault.work]], tuple(self.stacks)
        if fault.stack and fault.work in (EMBED, LEARN):
            between = f"between {names[fault.stack - 1]} and {names[fault.stack]}"
            words[0] = words[0].replace("before the layers", between)
        if fault.layer is not None:
            words[0] += f" of layer {fault.layer} of {self.stacks[names[fault.stack]]} (from 0)"
            if len(names) > 1:
                words[0] += f" in {names[fault.stack]}"
        if self.microbatches > 1:
            words.append(f"microbatch {fault.microbatch} of {self.microbatches}")
        if fault.stage is not None and self.stages > 1:
            words.append(f"stage {fault.stage} of {self.stages}")
            if self.chunks > 1:
                words.append(f"chunk {fault.chunk} of {self.chunks}")
        if self.stages > 1:
            words.append(f"tick {fault.tick}")
        return ", ".join(words)


def first_not_finite(
    plan: Record, loss: Callable[..., Any], params: Any, batch: Any, *state: Any, mesh: Mesh
) -> FirstNotFinite:
    """Return where the first value is that is not finite, see `Plan.first_not_finite`."""
    check_given((params, batch, *state), OF_LOSS)
    arrays.check(plan, params, batch, state=state[0] if state else None)
    sizes = {axis: {STAGE: 1, **plan.mesh}[axis] for axis in AXES if axis == STAGE or axis in plan.mesh}
    decision = dataclasses.replace(plan.decision(), mesh=sizes)
    mesh = of_plan(decision, mesh)
    planned = PlannedLoss(decision, loss, mesh)
    traced = planned.traces.on(params, batch, *state)
    kinds = dict(zip(("parameter", "batch array", "state array"), (params, batch, *state), strict=False))

    def flags(*args: Any) -> list[dict[str, Any]]:
        return [{path: are_finite([leaf]) for path, leaf in by_path(tree).items()} for tree in args]

    def first(*args: Any) -> Any:
        with automatic(mesh):
            return planned.first_not_finite(*args)

    found = jax.device_get(jax.jit(flags)(params, batch, *state))
    bad = {
        kind: tuple(path for path, sound in rows.items() if not sound)
        for kind, rows in zip(kinds, found, strict=True)
    }
    if bad := {kind: paths for kind, paths in bad.items() if paths}:
        return FirstNotFinite(arrays=bad)
    try:
        number = int(jax.jit(first)(params, batch, *state))
        stacks = _stacks(decision, mesh, traced)
    except UserError as why:
        return FirstNotFinite(refused=str(why))
    stages, chunks = decision.mesh[STAGE], decision.interleave
    numbering = Numbering(layers=tuple(stacks.values()), stages=stages, chunks=chunks)
    return FirstNotFinite(
        fault=numbering.fault(number),
        behind=number == BEHIND_SUMS,
        stacks=stacks,
        microbatches=decision.microbatches,
        stages=stages,
        chunks=chunks,
    )


def _stacks(plan: Decision, mesh: Mesh, traced: Traced) -> dict[str, int]:
    """Return the layers of each stack that stages cut, by what its parameters' paths have in common."""
    flat = prepared(plan, mesh, traced).traced
    params, *others = flat.args
    program = read(flat, state=(2,) if len(others) > 1 else ())
    paths = tuple(by_path(params))
    stacks = stacks_of(program, len(paths), plan.mesh[STAGE], plan.interleave)
    walked = (sorted(stacked_parameters(program, one, len(paths))) for one in stacks)
    names = folders_of([paths[n] for n in numbers] for numbers in walked)
    return dict(zip(names, (one.eqn.params["length"] for one in stacks), strict=True))
