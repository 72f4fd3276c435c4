"""From the raw factors of a walk to numbered dims, equation by equation."""

from __future__ import annotations

import dataclasses

from .op_rules.rule import Kind, places
from .program import Conflict, Dims, Equation, Factor, Scope
from .walk import Raw, RawEquation, RawScope, Walk, shape_of


@dataclasses.dataclass(slots=True)
class Use:
    """What equations do to a dim; `whole_at` and `windowed_at` are (equation index, primitive)."""

    useful: bool = False
    contracted: bool = False
    scanned: bool = False
    whole_at: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    windowed_at: list[tuple[int, str]] = dataclasses.field(default_factory=list)


class Resolver:
    """Numbers the atomic factors in the order they are met, and remembers how each is used."""

    def __init__(self, walk: Walk) -> None:
        self._factors = walk.factors
        self._ids: dict[int, int] = {}
        self._seqs: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._arrays: dict[Raw, Dims] = {}
        self._repeats: dict[Dims, tuple[int, ...]] = {}
        self._index = 0
        self.sizes: list[int] = []
        self.uses: list[Use] = []
        self.conflicts: list[Conflict] = []

    def seq(self, raw: tuple[int, ...]) -> tuple[int, ...]:
        """Return the dims that one array dimension consists of."""
        known = self._seqs.get(raw)
        if known is None:
            known = self._seqs[raw] = tuple([self._id(atom) for atom in self._factors.expand(raw)])
        return known

    def array(self, raw: Raw) -> Dims:
        """Return the dims of an array."""
        known = self._arrays.get(raw)
        if known is None:
            known = self._arrays[raw] = tuple([self.seq(seq) for seq in raw])
        return known

    def _id(self, atom: int) -> int:
        known = self._ids.get(atom)
        if known is None:
            known = self._ids[atom] = len(self.sizes)
            self.sizes.append(self._factors.size(atom))
            self.uses.append(Use())
        return known

    def scope(self, raw: RawScope, multiplicity: int = 1, counted: bool = True) -> Scope:
        """Resolve a scope that the program runs `multiplicity` times."""
        equations = tuple([self._equation(e, multiplicity, counted) for e in raw.equations])
        return Scope(
            jaxpr=raw.jaxpr,
            dims={var: self.array(dims) for var, dims in raw.dims.items()},
            equations=equations,
        )

    def _equation(self, raw: RawEquation, multiplicity: int, counted: bool) -> Equation:
        index = self._index
        self._index += 1
        primitive = raw.eqn.primitive.name
        rule = raw.rule
        factors: list[Factor] = []
        for k, (ins, outs) in enumerate(places(rule)):
            kind: Kind = "whole" if k in raw.torn else rule.kinds[k]
            dims = self.seq(raw.local[k])
            factors.append(Factor(kind=kind, size=rule.sizes[k], dims=dims, ins=ins, outs=outs))
            for dim in dims:
                self._used(self.uses[dim], kind, bool(ins), index, primitive)
        outs = tuple([self.array(dims) for dims in raw.outs])
        if not raw.scopes:
            for var, dims in zip(raw.eqn.outvars, outs, strict=True):
                self.note_conflicts(dims, shape_of(var), index, f"result of {primitive}")
        inner = multiplicity * (raw.trips if raw.trips is not None else 1)
        known = counted and raw.trips is not None
        return Equation(
            index=index,
            primitive=primitive,
            eqn=raw.eqn,
            factors=tuple(factors),
            ins=tuple([self.array(dims) for dims in raw.ins]),
            outs=outs,
            scopes=tuple([self.scope(scope, inner, known) for scope in raw.scopes]),
            trips=raw.trips,
            multiplicity=multiplicity,
            counted=counted,
        )

    @staticmethod
    def _used(use: Use, kind: Kind, consumed: bool, index: int, primitive: str) -> None:
        if kind == "whole":
            use.whole_at.append((index, primitive))
        elif kind == "window":
            use.windowed_at.append((index, primitive))
        elif consumed:
            use.useful = True
            use.contracted |= kind == "contract"
            use.scanned |= kind == "scan"

    def note_conflicts(self, dims: Dims, shape: tuple[int, ...], equation: int | None, array: str) -> None:
        """Record each dim that stands more than once in an array."""
        repeats = self._repeats.get(dims)
        if repeats is None:
            flat = [d for dim in dims for d in dim]
            repeats = ()
            if len(set(flat)) != len(flat):
                repeats = tuple(dict.fromkeys(d for n, d in enumerate(flat) if d in flat[:n]))
            self._repeats[dims] = repeats
        for dim in repeats:
            stands = tuple(n for n, ids in enumerate(dims) if dim in ids)
            self.conflicts.append(
                Conflict(dim=dim, equation=equation, array=array, shape=tuple(shape), places=stands)
            )
