"""What a backward pass keeps of a layer, and which of its equations it therefore runs again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from .flatten import LAYERS, Flat


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """Masks over values: kept on the device, on its host, with a factor of their gradient beside them.

    And over equations: run again.
    """

    device: np.ndarray
    host: np.ndarray
    twice: np.ndarray
    again: np.ndarray


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
            ins=tuple(tuple(leaf.ins) for leaf in flat.leaves),
            producer=tuple(value.producer for value in flat.values),
            source=tuple(value.source for value in flat.values),
            in_layers=tuple(leaf.section == LAYERS for leaf in flat.leaves),
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


def named_values(flat: Flat, names: Mapping[str, tuple[int, int | None]]) -> dict[str, np.ndarray]:
    """Return name → mask over values, from name → (equation's index, operand or None for its result)."""
    leaves = {leaf.equation.index: leaf for leaf in flat.leaves}
    masks = {}
    for name, (equation, operand) in names.items():
        leaf = leaves.get(equation)
        if leaf is None:
            continue
        mask = np.zeros(len(flat.values), bool)
        mask[leaf.outs[0] if operand is None else leaf.ins[operand]] = True
        masks[name] = mask
    return masks
