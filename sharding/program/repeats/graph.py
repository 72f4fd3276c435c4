"""What depends on what in a flat program, and its spine: equations on parameters and data, as traced.

What a layer computes apart from the stream (casts, masks, keys, tables of positions) is left out of the
spine, so that where and in which order it was computed does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .flat import FlatEquation, FlatProgram
from .keys import Written

# A value, or a number written in the program.
Atom = int | Written


class Graph:
    """Values and equations of `flat` by number.

    `users` are the equations that read a value, `results` the values that the program returns; `is_param`
    says which values come of parameters alone; `spine` are equations, and `position` gives the place of an
    equation on it. `owner` says which repeat holds an equation.
    """

    def __init__(self, flat: FlatProgram, is_param: Sequence[bool], is_data: Sequence[bool]) -> None:
        self.flat = flat
        count = len(flat.avals)
        param, data = [False] * count, [False] * count
        for value, p, d in zip(flat.ins, is_param, is_data, strict=True):
            param[value], data[value] = p, d
        if not any(is_data):
            for value, _ in flat.consts:
                data[value] = True
        apart = any(data)
        self.users: list[list[int]] = [[] for _ in range(count)]
        self.spine: list[int] = []
        for n, eqn in enumerate(flat.eqns):
            p = d = False
            for atom in eqn.ins:
                if not isinstance(atom, Written):
                    self.users[atom].append(n)
                    p |= param[atom]
                    d |= data[atom]
            for value in eqn.outs:
                param[value], data[value] = p, d
            if p and (d or not apart):
                self.spine.append(n)
        self.depends_on_params, self.depends_on_data = param, data
        self.is_param = [p and not d for p, d in zip(param, data, strict=True)]
        self.results = {value for value in flat.outs if not isinstance(value, Written)}
        self.position = {n: place for place, n in enumerate(self.spine)}
        self.owner: dict[int, int] = {}
        self._origins: dict[int, Any] = {}
        self._names: dict[Any, int] = {}
        self._slots()

    @property
    def eqns(self) -> list[FlatEquation]:
        """The equations."""
        return self.flat.eqns

    def maker(self, atom: Atom) -> int:
        """Return the equation that gives a value; -1 for inputs and numbers."""
        return -1 if isinstance(atom, Written) else self.flat.producer[atom]

    def place_of(self, value: int) -> int:
        """Return which result of its equation a value is."""
        return self.eqns[self.flat.producer[value]].outs.index(value)

    def origin(self, atom: Atom) -> Any:
        """Return what is equal for values that are computed alike, apart from the spine."""
        maker = self.maker(atom)
        if isinstance(atom, Written) or maker < 0 or maker in self.position:
            return atom.name if isinstance(atom, Written) else ("value", atom)
        if atom not in self._origins:
            one = self.eqns[maker]
            given = tuple([self.origin(inner) for inner in (*one.ins, *one.literals)])
            name = one.key, given, one.outs.index(atom)
            # Interned: what is made of many others would be as long as all that they are made of.
            self._origins[atom] = "made", self._names.setdefault(name, len(self._names))
        return self._origins[atom]

    def bytes_of(self, value: int) -> int:
        """Return the bytes of a value."""
        aval = self.flat.avals[value]
        return int(getattr(aval, "size", 1)) * int(getattr(getattr(aval, "dtype", None), "itemsize", 4))

    def _slots(self) -> None:
        """Lay out the operands of the spine: the place on it that each comes from, and which result it is."""
        start, made, which = [0], [], []
        for n in self.spine:
            for atom in self.eqns[n].ins:
                maker = self.maker(atom)
                made.append(self.position.get(maker, -1))
                which.append(-1 if maker < 0 or isinstance(atom, Written) else self.place_of(atom))
            start.append(len(made))
        self.start = np.array(start, np.int64)
        self.made, self.which = np.array(made, np.int64), np.array(which, np.int64)
