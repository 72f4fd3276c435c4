"""Which arrays the backward pass keeps under each rematerialisation policy."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from ..program.flops import matmul_roles
from ..program.layers import INPUT
from .candidate import Candidate
from .fusion import is_fusible, is_linear, kernel_roots
from .reads import ELEMENTWISE, factors, reads_of
from .tables import AFTER, LAYERS, Flat, FlatOp, Value


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Residuals:
    """What a candidate keeps for the backward pass, and what it runs again there.

    Attributes:
      device: values [V] kept on the device.
      host: values kept on its host.
      beside: of values, how many arrays as large are kept for factors of gradients, less the value itself
        where nothing else reads it.
      made: values that ops which run again give again, with what has to be reduced or exchanged for them.
      gathered: values that are gathered again, where they lie in parts.
      again: ops [E] that run again, besides those that the user's own checkpoints run again.
    """

    device: np.ndarray
    host: np.ndarray
    beside: np.ndarray
    made: np.ndarray
    gathered: np.ndarray
    again: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Saved:
    """Masks over values: what is kept in layers under each policy, and outside of them always.

    named: the values of a layer by name, see `meshwright.sharding.program.layers`.
    on_chip: what never reaches memory when attention is one kernel; core: the scores themselves.
    factors: of values of layers, as `Residuals.beside`, were everything kept.
    layers: of layers; results: what scans over them give, which is kept as what stands after them.
    """

    by_policy: dict[str, np.ndarray]
    named: dict[str, np.ndarray]
    on_chip: np.ndarray
    core: np.ndarray
    factors: np.ndarray
    flow: Flow
    layers: np.ndarray
    results: np.ndarray
    grad: np.ndarray
    cache: dict[object, Residuals] = dataclasses.field(default_factory=dict)

    def kept(self, candidate: Candidate, *, fused_attention: bool, everything: str = "none") -> Residuals:
        """Return what a candidate keeps and runs again.

        Args:
          candidate: its `remat` and `saved`.
          fused_attention: whether attention's scores are never in memory.
          everything: the policy that says what is kept where nothing is to run again.
        """
        key = (candidate.remat, tuple(candidate.saved.items()), fused_attention, everything)
        if key not in self.cache:
            self.cache[key] = self._kept(candidate, fused_attention, self.by_policy[everything])
        return self.cache[key]

    def _kept(self, candidate: Candidate, fused_attention: bool, everything: np.ndarray) -> Residuals:
        host = np.zeros(len(self.layers), bool)
        if candidate.remat == "none":
            inside = everything
        elif candidate.remat != "names":
            inside = self.by_policy[candidate.remat]
        else:
            inside = self.by_policy["full"].copy()
            for name, place in candidate.saved.items():
                mask = self.by_policy["full"] & self.layers if name == INPUT else self.named[name]
                inside = inside | mask
                host = host | mask if place == "host" else host
        device = np.where(self.layers, inside, everything)
        # What gradients of single operations read is there, kept or made again.
        needed = self.by_policy["none"] & self.layers
        if fused_attention:
            needed = needed & ~self.core
        again, read = self.flow.again(device, needed)
        # What a policy would keep and no gradient comes from is dropped; the stream goes on in any case.
        device &= read | ~self.layers | self.by_policy["full"]
        # JAX keeps f'(x) where it keeps everything; x and f(x) are there too if something else reads them.
        beside = self.factors * (device & (candidate.remat == "none"))
        return Residuals(
            device=device & ~host,
            host=host,
            beside=beside,
            made=self.flow.given_by(again),
            # XLA keeps an operand as it lies between layers: its gradient gathers it once more.
            gathered=self.grad & (self.layers | self.results),
            again=again,
        )


def residuals(flat: Flat, names: Mapping[str, tuple[int, int | None]]) -> Saved:
    """Return what each policy keeps; `names` are the values of layers that may be named.

    ``none`` keeps what JAX's gradients of single operations read, after the layers what that is made of;
    ``none/fused`` what fused kernels with their own gradients read, ``none/given`` what of that elementwise
    work gives of the rest of it; ``dots`` the results of products without batch dims, and the carry; ``full``
    the carry.
    """
    count = len(flat.values)
    carry = np.zeros(count, bool)
    carry[list(flat.streams)] = True
    masks = {"none": carry.copy(), "none/fused": carry.copy(), "dots": carry.copy(), "full": carry.copy()}
    reads = reads_of(flat)
    for op, read in zip(flat.ops, reads, strict=True):
        entering = _entering(flat, op) if op.rematted else []
        for index in entering:
            masks["none/fused"][index] = True
        for index in entering or ([] if op.rematted else read):
            masks["none"][index] = True
            if op.section != LAYERS:
                masks["dots"][index] = masks["full"][index] = True
        if op.rematted:
            continue
        roles = matmul_roles(op.equation)
        if roles is not None and not roles.batch and op.section == LAYERS:
            masks["dots"][list(op.outs)] = True
    for index in _read_by_kernels(flat, reads):
        masks["none/fused"][index] = True
    for ins, outs, *_ in flat.calls:
        # A kernel's gradient reads what the kernel read and wrote.
        for index in (*(i for i in ins if flat.values[i].grad), *outs):
            masks["none"][index] = masks["none/fused"][index] = True
    masks["none/given"] = _given(flat, masks["none/fused"])
    masks["none"] = _before_elementwise(flat, masks["none"])
    kept = np.array([_is_kept(flat, n) for n in range(count)], bool)
    results = np.array([_is_result(flat, value) for value in flat.values], bool)
    return Saved(
        factors=factors(flat, reads),
        by_policy={policy: mask & kept for policy, mask in masks.items()},
        named=named_values(flat, names),
        core=np.array([value.core or value.call >= 0 for value in flat.values], bool),
        flow=Flow.of(flat),
        layers=np.array([value.section == LAYERS for value in flat.values], bool) & ~results,
        results=results,
        grad=np.array([value.grad for value in flat.values], bool),
        on_chip=np.array([_is_on_chip(flat, n) for n in range(count)], bool),
    )


def _given(flat: Flat, fused: np.ndarray) -> np.ndarray:
    """Return what fused kernels read that elementwise work of layers gives of other such values."""
    had = fused | np.array([value.parameter >= 0 or value.elements <= 1 for value in flat.values], bool)
    found = np.zeros(len(flat.values), bool)
    for op in flat.ops:
        if op.section == LAYERS and is_fusible(op) and op.ins and had[list(op.ins)].all():
            found[list(op.outs)] = had[list(op.outs)] = True
    return found & fused


def _before_elementwise(flat: Flat, kept: np.ndarray) -> np.ndarray:
    """Return what is kept [V] where compilers make again what is elementwise after the layers.

    They keep what it is made of instead, where that is no more: of a float32 norm what it took in bfloat16.
    """
    made: dict[int, frozenset[int]] = {}
    for op in flat.ops:
        if op.section == AFTER and op.runs == 1 and op.equation.primitive in ELEMENTWISE and op.ins:
            of = frozenset(root for index in op.ins for root in made.get(index, (index,)))
            made.update(dict.fromkeys(op.outs, of))
    found = kept.copy()
    for index in (index for index in np.flatnonzero(kept).tolist() if index in made):
        more = [root for root in made[index] if not found[root] and _is_kept(flat, root)]
        if sum(flat.values[root].bytes for root in more) <= flat.values[index].bytes:
            found[index], found[more] = False, True
    return found


def _is_on_chip(flat: Flat, index: int) -> bool:
    value = flat.values[index]
    if flat.calls:
        return value.call >= 0
    if value.core or value.producer < 0:
        return value.core
    op = flat.ops[value.producer]
    return any(flat.values[i].core for i in op.ins)


def _is_result(flat: Flat, value: Value) -> bool:
    inside = value.section == LAYERS and value.source >= 0
    return inside and value.trips < flat.values[value.source].trips


def _is_kept(flat: Flat, index: int) -> bool:
    value = flat.values[index]
    return value.parameter < 0 and value.elements > 1


def made_of_parameters(flat: Flat) -> dict[int, float]:
    """Return parameter → bytes, for all layers, of what they make of it and their gradients read.

    JAX reads a layer's parameter itself where it lies, but keeps its cast, and so for every layer. What is
    larger than the parameter is a broadcast of it, which is part of what reads it.
    """
    found: dict[int, float] = defaultdict(float)
    elements = {
        value.parameter: value.elements
        for value in flat.values
        if value.section == LAYERS and value.producer < 0
    }
    read = (
        each
        for op, each in zip(flat.ops, reads_of(flat), strict=True)
        if op.section == LAYERS and not op.rematted
    )
    for index in {index for each in read for index in each}:
        value = flat.values[index]
        if value.producer >= 0 and 1 < value.elements <= elements.get(value.parameter, 0):
            found[value.parameter] += value.bytes * value.trips
    return found


def _entering(flat: Flat, op: FlatOp) -> list[int]:
    """Return what a checkpointed equation reads from outside of what is run again with it."""

    def outside(index: int) -> bool:
        maker = flat.values[index].producer
        return maker < 0 or not flat.ops[maker].rematted

    return [index for index in op.ins if flat.values[index].grad and outside(index)]


def _read_by_kernels(flat: Flat, reads: Sequence[Sequence[int]]) -> set[int]:
    """Return what products and fused kernels with gradients of their own keep of their operands."""
    kept: set[int] = set()
    roots = kernel_roots(flat)
    members: dict[int, list[FlatOp]] = defaultdict(list)
    for number, op in enumerate(flat.ops):
        if op.rematted:
            continue
        if is_fusible(op):
            members[roots[number]].append(op)
        else:
            kept.update(reads[number])
    for group in members.values():
        if all(is_linear(flat, op) for op in group):
            continue
        made = {i for op in group for i in op.outs}
        inside = group[0].section == LAYERS
        for index in (i for op in group for i in op.ins if i not in made and flat.values[i].grad):
            # What comes out of the last layer is kept once, not in every layer.
            if inside or flat.values[index].section != LAYERS:
                kept.add(index)
    return kept


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Flow:
    """What each equation reads, and which equation, or view of another value, gives each value; -1: none."""

    ins: tuple[tuple[int, ...], ...]
    producer: tuple[int, ...]
    source: tuple[int, ...]
    in_layers: tuple[bool, ...]

    @classmethod
    def of(cls, flat: Flat) -> Flow:
        """Read the flow of `flat`."""
        return cls(
            ins=tuple(tuple(op.ins) for op in flat.ops),
            producer=tuple(value.producer for value in flat.values),
            source=tuple(value.source for value in flat.values),
            in_layers=tuple(op.section == LAYERS for op in flat.ops),
        )

    def again(self, kept: np.ndarray, needed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the equations of layers [E] that give the `needed` values, and what they are made from.

        The latter are those of the kept values [V] that are needed or give what is.
        """
        found, read = np.zeros(len(self.ins), bool), kept & needed
        left = np.flatnonzero(needed & ~kept).tolist()
        seen = set(left)
        while left:
            index = left.pop()
            maker = self.producer[index]
            if maker < 0:
                before = (self.source[index],)
            elif self.in_layers[maker]:
                found[maker] = True
                before = self.ins[maker]
            else:
                continue
            for other in before:
                if other >= 0 and kept[other]:
                    read[other] = True
                elif other >= 0 and other not in seen:
                    seen.add(other)
                    left.append(other)
        return found, read

    def given_by(self, ops: np.ndarray) -> np.ndarray:
        """Return the values [V] that the ops [E] of a mask give."""
        makers = np.array(self.producer, int)
        return (makers >= 0) & ops[makers] if len(ops) else np.zeros(len(makers), bool)


def named_values(flat: Flat, names: Mapping[str, tuple[int, int | None]]) -> dict[str, np.ndarray]:
    """Return name → mask over values, from name → (equation's index, operand or None for its result)."""
    ops = {op.equation.index: op for op in flat.ops}
    masks = {}
    for name, (equation, operand) in names.items():
        op = ops.get(equation)
        if op is None:
            continue
        mask = np.zeros(len(flat.values), bool)
        mask[op.outs[0] if operand is None else op.ins[operand]] = True
        masks[name] = mask
    return masks
