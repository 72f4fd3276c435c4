"""Parameters that no rule speaks of, laid out by the trace as a search would, and axes that shard none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jax.extend import core

from ..cost.candidate import Candidate
from ..errors import UserError, nearest, nearest_divisors
from ..hardware.topology import Topology
from ..paths import matches
from ..plans.specs import axes_in
from ..program.mixtures import experts_dims
from ..program.program import Argument, Program
from ..rules.application import is_pattern, mentioned
from ..rules.rules import Rules
from ..xla.compiler import compiler_of
from .choices.storage import shards_no_parameter, store
from .choices.tensor import TensorGroups
from .declared import DATA_NAMES, Declared, Ruled

# The axis that stores parameters which it does not compute with.
_STORING = "fsdp"
# The axis that needs experts: calls of `ops.experts`, or a dimension of that name.
_OF_EXPERTS = "expert"


def with_unnamed(program: Program, topology: Topology, declared: Declared, laid: Ruled) -> Ruled:
    """Return a declared layout, with the parameters that no rule speaks of laid out by the trace.

    Those are parameters without names, or with one that no rule knows. ``tensor`` shards of their dimensions
    what it would in a search, if it shards nothing yet, and ``fsdp`` stores them in parts.

    Raises UserError for an axis that shards no parameter though rules give it some, or nothing at all.
    """
    rules = Rules(declared.rules).with_defaults()
    open_ = {a.index for a in program.parameters if _is_open(a, rules)}
    candidate = laid.candidate
    if open_:
        candidate = _stored(program, topology, _computed(program, candidate, open_), rules, open_)
    _check_axes(program, candidate, laid, rules)
    return dataclasses.replace(laid, candidate=candidate)


def _is_open(argument: Argument, rules: Rules) -> bool:
    if any(is_pattern(key) and matches(key, argument.path) for key in rules.declared):
        return False
    given = [name for name in argument.names if name is not None]
    return not given or any(name not in _known(rules) for name in given)


def _known(rules: Rules) -> set[str]:
    return {key for key in (*rules.declared, *rules.defaults) if not is_pattern(key)}


def _computed(program: Program, candidate: Candidate, open_: set[int]) -> Candidate:
    """Return `candidate` with ``tensor`` over dimensions of what is open, if it has no other."""
    size, axis = candidate.mesh.get("tensor", 1), "tensor"
    used = {one for axes in candidate.dims.values() for one in axes}
    used.update(one for storage in candidate.stored.values() for axes in storage for one in axes)
    if size == 1 or axis in used:
        return candidate
    ruled = {dim for a in program.parameters if a.index not in open_ for c in a.dims for dim in c} | {
        *candidate.dims
    }
    groups = TensorGroups(program, ruled).of(size)
    if not groups:
        return candidate
    return dataclasses.replace(candidate, dims={**candidate.dims, **dict.fromkeys(groups[0], (axis,))})


def _stored(
    program: Program, topology: Topology, candidate: Candidate, rules: Rules, open_: set[int]
) -> Candidate:
    known = _known(rules)
    kept = {
        argument.index: {
            n: candidate.stored[argument.index][n] for n, name in enumerate(argument.names) if name in known
        }
        for argument in program.parameters
    }
    over = (_STORING,) if candidate.mesh.get(_STORING, 1) > 1 else ()
    found = store(
        program,
        candidate.mesh,
        candidate.dims,
        over=over,
        declared=kept,
        tile_rows=compiler_of(topology).tile_rows,
        chunks=candidate.interleave,
    ).params
    stored = {index: found[index] if index in open_ else old for index, old in candidate.stored.items()}
    return dataclasses.replace(candidate, stored=stored, optimizer=stored, gradients=stored)


def _check_axes(program: Program, layout: Candidate, laid: Ruled, rules: Rules) -> None:
    """Refuse a mesh axis that shards nothing, or no parameter where rules give it some."""
    of_parameters = {axis for storage in layout.stored.values() for axes in storage for axis in axes}
    working = of_parameters | {axis for row in laid.batch.values() for axis in axes_in(row.spec)}
    working.update(axis for axes in layout.dims.values() for axis in axes)
    by_hand = _cut_by_hand(program.jaxpr.jaxpr)
    meant: dict[str, str] = {}
    for key, rule in {**rules.defaults, **rules.declared}.items():
        if key not in DATA_NAMES:
            for axis in mentioned(rule):
                meant.setdefault(axis, key)
    for axis, size in layout.mesh.items():
        if size == 1 or axis in of_parameters or (axis, size) in by_hand:
            continue
        if axis == _OF_EXPERTS:
            _check_divides(program, size)
        if axis not in working:
            other = sorted(count for name, count in by_hand if name == axis)
            if other:
                raise UserError(
                    f"mesh axis {axis}={size} is not that of the loss's own manual regions (jax.shard_map), "
                    f"which cut arrays over {axis}={other[0]}; say {axis}={other[0]}, or make their mesh so"
                )
            raise UserError(
                f"mesh axis {axis}={size} shards nothing in this program; give it a rule, "
                f"or its devices to another axis, e.g. {axis}=1, data=-1"
                + (_no_experts(program, size) if axis == _OF_EXPERTS and not experts_dims(program) else "")
            )
        if axis in meant and program.parameters:
            raise UserError(_shards_no_parameter(program, axis, size, meant[axis], _known(rules)))


def _cut_by_hand(jaxpr: core.Jaxpr) -> set[tuple[str, int]]:
    """Return the axes, with their sizes, that the loss's own regions (`jax.shard_map`) cut arrays over."""
    found = set[tuple[str, int]]()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "shard_map":
            specs = (*eqn.params["in_specs"], *eqn.params["out_specs"])
            found.update((axis, eqn.params["mesh"].shape[axis]) for spec in specs for axis in axes_in(spec))
        for inner in core.jaxprs_in_params(eqn.params):
            found |= _cut_by_hand(inner)
    return found


def _no_experts(program: Program, size: int) -> str:
    """Return how to say which experts there are: by the largest parameter that may hold a matrix of each.

    Those are the dimension before the last two, as experts are written in batched products.
    """
    of_many = [one for one in program.parameters if len(one.shape) > 2 and one.shape[-3] % size == 0]
    if not of_many:
        return "; it has no call of meshwright.sharding.ops.experts, and no parameter with a matrix for each"
    largest = max(of_many, key=lambda one: math.prod(one.shape))
    names = (*(None for _ in largest.shape[3:]), "experts", None, None)
    return (
        "; it has no call of meshwright.sharding.ops.experts: of experts written otherwise name the "
        f"dimension, e.g. names={{{largest.path!r}: {names}}}"
    )


def _check_divides(program: Program, size: int) -> None:
    """Raise UserError if an axis of experts divides none of those that calls of `ops.experts` have."""
    counts = sorted({program.dims[dim].size for dim in experts_dims(program)})
    if counts and all(count % size for count in counts):
        written, near = " and ".join(map(str, counts)), nearest_divisors(math.gcd(*counts), size)
        raise UserError(f"mesh axis expert={size} does not divide {written} experts; nearest: {near}")


def _shards_no_parameter(program: Program, axis: str, size: int, rule: str, known: set[str]) -> str:
    names: Sequence[str] = list(dict.fromkeys(n for a in program.parameters for n in a.names if n))
    said = [name for name in names if name not in known]
    why = None
    if said:
        why = f"no rule knows {said[0]!r}: {nearest(said[0], known)}"
    elif names and rule not in names and not is_pattern(rule):
        why = f"the rule {rule} is for a dimension that no parameter has; theirs are {', '.join(names[:6])}"
    return shards_no_parameter(program, axis, size, why)
