"""A loss whose parts go through stages: its programs, cut once, and the workers that run them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from ...program.jaxpr import Pass, Traces
from ...program.program import Program
from ...program.tracing import read
from ..constrain import Constrain
from .beside import waits
from .cut import LayerCut, cut_at_layers
from .slots import STAGE, Slots, slots_of
from .stream import Stages
from .ticks import Array, Worker
from .watch import Numbering
from .workers import Workers

# Gives a list of arrays of (parameters, a part's rows, a state if there is one, (its number, sums)).
Function = Callable[..., list[Array]]

# Gives the passes over a program of (parameters, …), of which gradients are taken or not.
Passes = Callable[..., list[Pass]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Staged:
    """How parts go through stages: `microbatches` of them, in a region of `mesh`, with `passes`.

    Of the stages `sharers` share the rows of a microbatch out, before and behind the layers.
    `stacks` says of each stack of layers which ones a stage has.
    `params` and `state` are the shapes of what is stored, a tree each, of whole arrays; `trained` are the
    numbers of the parameters' leaves that may be; `widens` is as of `gather.ByHand`;
    gradients of layers' weights may be `delayed`.
    """

    mesh: Mesh | AbstractMesh
    microbatches: int
    sharers: int
    stacks: Sequence[Slots]
    passes: Passes
    params: Any
    state: tuple[Any, ...]
    trained: Sequence[int]
    widens: bool
    delayed: bool
    reruns: bool

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return self.mesh.shape[STAGE]

    @property
    def watched(self) -> bool:
        """Whether layers are watched for values that are not finite."""
        return self.stacks[0].watched

    def run(
        self,
        of_share: Function,
        of_whole: Function,
        *,
        params: Sequence[Array],
        batch: Any,
        cut: Sequence[bool],
        state: Sequence[Array],
        number: Array,
        known: Any,
        places: Sequence[int],
        cotangents: Sequence[Array],
        sums: Any,
        add: Callable[[Any, Sequence[Array]], tuple[Any, Any]],
    ) -> tuple[Any, Any, Any]:
        """Return sums, gradients of the parameters at `places`, and rows of all microbatches, of one device.

        `of_share` and `of_whole` are the loss's function of a stage's share of a microbatch, and of all of
        it; their first outputs have the `cotangents`. `batch` is the tree of a device's rows, of which the
        leaves that are `cut` are rows; `number` is that of its first microbatch, `known` what they read
        besides.
        """
        leaves, structure = jax.tree.flatten(batch)

        def part(microbatch: Array) -> Array:
            return microbatch * self.sharers + lax.axis_index(STAGE) % self.sharers

        def rows(microbatch: Array, shared: bool) -> list[Array]:
            parts = self.microbatches * (self.sharers if shared else 1)
            place = part(microbatch) if shared else microbatch
            sizes = [leaf.shape[0] // parts if one else 0 for leaf, one in zip(leaves, cut, strict=True)]
            taken = zip(leaves, cut, sizes, strict=True)
            return [lax.dynamic_slice_in_dim(x, place * n, n) if one else x for x, one, n in taken]

        def inputs(microbatch: Array, shared: bool) -> list[Array]:
            index = part(number + microbatch) if shared else number + microbatch
            return [*rows(microbatch, shared), *state, index, *jax.tree.leaves(known)]

        learns = bool(places)
        share = self._program(of_share, structure, rows(jnp.int32(0), True), number, known)
        whole = self._program(of_whole, structure, rows(jnp.int32(0), False), number, known)
        data = [len(params) + n for n, one in enumerate(cut) if one]
        # The part's number stands behind the state: what is drawn for a part depends on it.
        data.append(len(params) + len(leaves) + len(state))
        cuts = cut_at_layers(share, whole, self.sharers, self.stacks, len(params), self.trained, data)
        on_share, on_whole = (
            self.passes(one, self.params, *self.state, learns=learns) for one in (share, whole)
        )
        brought = [slots_of(self.stacks, n).brought(n, leaf) for n, leaf in enumerate(params)]
        received: list[Array] = []
        workers = [
            dataclasses.replace(
                self._worker(number, one, on_share, on_whole, received),
                leaves=brought,
                inputs=inputs,
                places=places,
                cotangents=cotangents,
                add=add,
            )
            for number, one in enumerate(cuts)
        ]
        one = workers[0] if len(workers) == 1 else Workers(stacks=workers)
        sums, gradients, parts = one.run(sums)
        pairs = zip(places, gradients, strict=False)
        return sums, [slots_of(self.stacks, n).taken_back(n, one) for n, one in pairs], parts

    def _program(
        self, function: Function, structure: Any, rows: Sequence[Array], number: Array, known: Any
    ) -> Program:
        # Of rows by block nothing is made ahead.
        args = (self.params, jax.tree.unflatten(structure, rows), *self.state, (number, known, []))
        return read(Traces(function).on(*args), state=(2,) if self.state else ())

    def _worker(
        self,
        number: int,
        cut: LayerCut,
        on_share: list[Pass],
        on_whole: list[Pass],
        received: list[Array],
    ) -> Worker:
        # What is of one dimension is so in the share's program too: they differ in their rows alone.
        lays = next(one for one in on_whole if isinstance(one, Constrain))
        stages = Stages(
            count=self.stages,
            sharers=self.sharers,
            items=cut.items,
            lies=[lays.lying(jax.ShapeDtypeStruct(one.shape, one.dtype), one.dims)[1] for one in cut.items],
            mesh=jax.sharding.get_abstract_mesh(),
            on_cpu=self.widens,
            received=received,
        )
        return Worker(
            cut=cut,
            slots=self.stacks[number],
            numbering=Numbering.of(self.stacks),
            stack=number,
            waits=waits(number, len(self.stacks), self.stages, self.stacks[number].chunks),
            reruns=self.reruns,
            microbatches=self.microbatches,
            on_share=on_share,
            on_whole=on_whole,
            stages=stages,
            leaves=(),
            inputs=lambda microbatch, shared: [],
            places=(),
            cotangents=(),
            lying=lambda value, dims: lays.lying(value, dims)[0],
            add=lambda sums, found: (sums, ()),
            delayed=self.delayed,
        )
