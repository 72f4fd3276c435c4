"""The values of a program that is run anew, and what differs between layers, stacked for a scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ..stacks import stacked
from .graph import Atom, Graph
from .keys import Written
from .lookups import TakenLayers

# What the index of a row may be computed by, where the program writes it (`i < 0 ? i + n : i`).
_INDEXING = {
    "lt": lambda a, b: a < b,
    "add": lambda a, b: a + b,
    "select_n": lambda which, no, yes: yes if which else no,
    "convert_element_type": lambda a: a,
}


class Evaluation:
    """Values by number; `rows_of` are those that are rows of an array that a scan gave."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.values: dict[int, Any] = {}
        self.rows_of: dict[int, tuple[Any, int]] = {}

    def read(self, atom: Atom) -> Any:
        """Return the value of an operand."""
        if isinstance(atom, Written):
            return atom.value
        if atom not in self.values:
            array, row = self.rows_of[atom]
            self.values[atom] = jax.lax.index_in_dim(array, row, keepdims=False)
        return self.values[atom]

    def stack(self, row: Sequence[Atom], dtype: Any = None) -> Any:
        """Return the values of `row` stacked, cast to `dtype`; rows of one array in order are that array."""
        if all(isinstance(atom, Written) for atom in row):
            first = row[0]
            assert isinstance(first, Written)
            return stacked([np.asarray(atom.value, first.aval.dtype) for atom in row])  # type: ignore[union-attr]
        whole = self._array(row)
        if whole is None:
            return stacked([self.read(atom) for atom in row], dtype)
        return whole if dtype is None else jax.lax.convert_element_type(whole, dtype)

    def _array(self, row: Sequence[Atom]) -> Any:
        """Return the array that `row` are rows of, each once; None if they are not."""
        found = [self._place(atom) for atom in row]
        places = [one[1] for one in found if one is not None]
        arrays = {id(one[0]): one[0] for one in found if one is not None}
        if len(places) < len(row) or len(arrays) != 1:
            return None
        found = TakenLayers(turns=tuple(places))
        return found.of(next(iter(arrays.values()))) if found.is_once else None

    def _place(self, atom: Atom) -> tuple[Any, int] | None:
        """Return the array that a value is a row of, and which."""
        if isinstance(atom, Written):
            return None
        if atom in self.rows_of:
            return self.rows_of[atom]
        graph = self._graph
        maker = graph.maker(atom)
        if maker < 0:
            return None
        eqn = graph.eqns[maker]
        if eqn.name != "squeeze" or tuple(eqn.eqn.params["dimensions"]) != (0,):
            return None
        maker = graph.maker(eqn.ins[0])
        if maker < 0:
            return None
        eqn = graph.eqns[maker]
        array, params = eqn.ins[0], eqn.eqn.params
        if eqn.name == "slice":
            starts: list[int | None] = list(params["start_indices"])
            sizes = tuple(b - a for a, b in zip(starts, params["limit_indices"], strict=True))  # type: ignore[operator]
            if any(stride != 1 for stride in params["strides"] or ()):
                return None
        elif eqn.name == "dynamic_slice":
            starts = [self._number(one) for one in eqn.ins[1:]]
            sizes = tuple(params["slice_sizes"])
        else:
            return None
        if isinstance(array, Written):
            return None
        shape = graph.flat.avals[array].shape
        if starts[0] is None or None in starts or any(starts[1:]) or sizes != (1, *shape[1:]):
            return None
        return self.read(array), starts[0]

    def _number(self, atom: Atom) -> int | None:
        """Return the value of an index that is written in the program."""
        if isinstance(atom, Written):
            return int(atom.value)
        maker = self._graph.maker(atom)
        if maker < 0 or self._graph.eqns[maker].name not in _INDEXING:
            return None
        eqn = self._graph.eqns[maker]
        inputs = [self._number(one) for one in eqn.ins]
        return None if None in inputs else int(_INDEXING[eqn.name](*inputs))
