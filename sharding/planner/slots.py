"""An optimizer's arrays under a candidate: the bytes that a device holds of them, and which lie whole."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from ..cost.candidate import Candidate
from ..hardware.topology import Topology
from ..paths import by_path
from ..plans.arrays import Lying, item_bytes, least_that_matters
from ..plans.owners import ALL, Owners
from ..plans.specs import axes_in, cut_into, spec_of
from ..program.program import Program
from ..transform.optimizer import own_state

if TYPE_CHECKING:
    import optax


class OptimizerArrays:
    """The arrays of an optimizer of `program`'s parameters, of which `params` are those that are trained."""

    def __init__(self, program: Program, optimizer: optax.GradientTransformation, params: Any) -> None:
        state = jax.eval_shape(functools.partial(own_state, optimizer), params)
        self.slot_bytes = slot_bytes(state, params)
        self._trained = {one.path: one for one in program.parameters if one.is_trained}
        self._parameter_bytes = sum(_size(one) * one.dtype.itemsize for one in program.parameters)
        self._owners = Owners({path: one.shape for path, one in self._trained.items()})
        self._arrays: Mapping[str, Any] = by_path(state)

    @functools.cached_property
    def like_parameters(self) -> bool:
        """Whether every parameter has as many bytes for each element, in arrays of its own shape."""
        held: Counter[str] = Counter()
        for path, leaf in self._arrays.items():
            if not leaf.ndim:
                continue
            owned = self._owners.of(path, leaf.shape)
            parameter = self._trained.get(owned.owner or "")
            if parameter is None or parameter.shape != leaf.shape:
                return False
            held[parameter.path] += _bytes(leaf)
        return all(held[path] == self.slot_bytes * _size(one) for path, one in self._trained.items())

    def bytes_per_device(self, candidate: Candidate, topology: Topology) -> float:
        """Return the bytes that one device would hold, had each stage of a pipeline all layers."""
        lying = self._lying(candidate, topology)
        mesh = {**candidate.mesh, "stage": 1}
        return sum(
            _bytes(leaf) / cut_into(axes_in(tuple(lying.spec(path, leaf))), mesh)
            for path, leaf in self._arrays.items()
        )

    def sized(self, topology: Topology) -> Callable[[Candidate], float] | None:
        """Return what gives `bytes_per_device`, None where every array lies as its parameter."""
        if self.like_parameters:
            return None
        return lambda candidate: self.bytes_per_device(candidate, topology)

    def notes(self, candidate: Candidate, topology: Topology) -> tuple[str, ...]:
        """Say which arrays that matter lie whole on every device although their parameter is cut."""
        lying = self._lying(candidate, topology)
        found = []
        for path, leaf in self._arrays.items():
            shape = tuple(leaf.shape)
            if _bytes(leaf) <= lying.least or axes_in(tuple(lying.spec(path, leaf))):
                continue
            owner = self._owners.of(path, shape).owner
            cut = lying.axes if owner is None or owner == ALL else axes_in(lying.specs[owner])
            if not cut:
                continue
            over = " x ".join(f"{axis}={candidate.mesh[axis]}" for axis in cut)
            divided = any(size % candidate.mesh[axis] == 0 for size in shape for axis in cut)
            why = (
                f"it lacks the dimension of {owner} that {over} cuts"
                if divided and owner in lying.specs
                else f"{over} divides no dimension of it"
            )
            found.append(f"the optimizer's {path} {shape} lies whole on every device: {why}")
        return tuple(found)

    def _lying(self, candidate: Candidate, topology: Topology) -> Lying:
        return Lying(
            owners=self._owners,
            specs={path: spec_of(candidate.optimizer[one.index]) for path, one in self._trained.items()},
            mesh=candidate.mesh,
            least=least_that_matters(topology, self._parameter_bytes),
        )


def slot_bytes(state: Any, params: Any) -> float:
    """Return the bytes of an optimizer's arrays, its `state`, for each element of the parameters."""
    total = sum(_bytes(leaf) for leaf in jax.tree.leaves(state) if leaf.ndim)
    return total / max(sum(_size(leaf) for leaf in jax.tree.leaves(params)), 1)


def _size(array: Any) -> int:
    return math.prod(array.shape)


def _bytes(leaf: Any) -> int:
    return _size(leaf) * item_bytes(str(leaf.dtype))
