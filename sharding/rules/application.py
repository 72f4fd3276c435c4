"""Rules applied to the arrays of a tree on one mesh: PartitionSpecs, and notes where a default yielded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .. import paths as tree_paths
from ..errors import UserError, nearest, nearest_cuts, nearest_divisors, wrong
from ..paths import Leaf
from ..words import first_of

if TYPE_CHECKING:
    from jax.sharding import PartitionSpec

Axes = tuple[str, ...]
Names = tuple[str | None, ...]

# Dimensions of the data alone. A default for one of them does not yield: left whole, the dimension would have
# every device repeat the same work.
_OF_DATA = ("batch", "sequence")


def is_pattern(key: str) -> bool:
    """Whether a rule's key is a pattern over paths rather than a named dimension."""
    return "/" in key or "*" in key


def mentioned(rule: Iterable[Any]) -> list[str]:
    """Return the axes that a checked rule mentions, repeated as often as it mentions them."""
    return [axis for entry in rule for axis in ((entry,) if isinstance(entry, str) else entry)]


def axis_sizes(mesh: Any) -> dict[str, int]:
    """Return axis → size of a Mesh, an AbstractMesh or such a mapping."""
    sizes = mesh if isinstance(mesh, Mapping) else getattr(mesh, "shape", None)
    if not isinstance(sizes, Mapping):
        raise wrong("mesh", mesh, 'is neither a mesh nor axis → size, such as {"data": 8}')
    for axis, size in sizes.items():
        if not isinstance(axis, str) or isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise wrong("mesh", dict(sizes), f"gives {axis!r} the size {size!r}; write a whole number from 1")
    return dict(sizes)


class Application:
    """Rules on one mesh, with a record of the patterns that matched and of the defaults that yielded.

    Raises:
      UserError: on construction, if a declared rule names an axis that the mesh does not have.
    """

    def __init__(self, declared: Mapping[str, Any], defaults: Mapping[str, Axes], mesh: Any) -> None:
        self._declared, self._defaults, self._sizes = declared, defaults, axis_sizes(mesh)
        self._matched: set[str] = set()
        self._yielded: dict[tuple[str, str], list[str]] = {}
        for key, rule in declared.items():
            for axis in mentioned(rule):
                if axis not in self._sizes:
                    raise UserError(
                        f"rule {key}: the mesh has no axis {axis!r}; {nearest(axis, self._sizes)}"
                    )

    def tree(self, tree: Any, names: Any, partial: bool) -> Any:
        """Return a tree like `tree` of PartitionSpecs; see `Rules.specs`."""
        leaves, structure = tree_paths.flatten(tree)
        known = {} if names is None else tree_paths.names_by_path(names)
        found = [tree_paths.by_suffix(leaf.path, known) for leaf in leaves]
        self._check_names(leaves, found, known, partial)
        specs = []
        for leaf, key in zip(leaves, found, strict=True):
            specs.append(self._leaf(leaf, None if key is None else known[key]))
        if not partial:
            self._check_patterns(leaves)
            self._check_dimensions(
                {name for key in found if key for name in known[key] if name}, names is not None
            )
        return structure.unflatten(specs)

    def array(self, shape: tuple[int, ...], names: Names) -> PartitionSpec:
        """Return the PartitionSpec of one array with a name for each dimension."""
        if not all(isinstance(size, int) for size in shape):
            raise wrong("shape", shape, "is no shape, such as (8, 128)")
        leaf = Leaf(path="", shape=shape, in_record=False)
        if len(names) != len(shape):
            raise UserError(_misnamed(leaf, names))
        return _spec(self._by_name(leaf, names))

    def notes(self) -> list[str]:
        """Return a sentence for each reason why something stayed whole, with the arrays that it concerns."""
        return [
            f"{what} stays whole in {first_of(paths)}: {why}"
            if paths != [""]
            else f"{what} stays whole: {why}"
            for (what, why), paths in self._yielded.items()
        ]

    def _leaf(self, leaf: Leaf, names: Names | None) -> PartitionSpec:
        pattern = self._pattern(leaf.path)
        if math.prod(leaf.shape) == 1 and (leaf.in_record or not leaf.shape):
            # A counter, or the placeholder that some optimizers keep for a parameter that they do not track.
            return _spec([])
        fits = names is not None and len(names) == len(leaf.shape)
        labels = names if names is not None and fits else (None,) * len(leaf.shape)
        if pattern is not None:
            return _spec(self._by_pattern(pattern, leaf, labels))
        if names is not None and not fits:
            self._yield("optimizer state", "its rank is not its parameter's", leaf.path)
        return _spec(self._by_name(leaf, labels))

    def _pattern(self, path: str) -> str | None:
        """Return the pattern that applies to `path`, if any."""
        matching = [key for key in self._declared if is_pattern(key) and tree_paths.matches(key, path)]
        self._matched.update(matching)
        if not matching:
            return None
        best = max(map(tree_paths.specificity, matching))
        closest = [key for key in matching if tree_paths.specificity(key) == best]
        if len({self._declared[key] for key in closest}) > 1:
            raise UserError(
                f"rules {closest[0]} and {closest[1]} both match {path}; make one of them more specific"
            )
        return closest[0]

    def _by_pattern(self, pattern: str, leaf: Leaf, labels: Names) -> list[Axes]:
        entries: tuple[Axes, ...] = self._declared[pattern]
        if len(entries) > len(leaf.shape):
            if not leaf.in_record:
                raise UserError(_too_long(pattern, entries, leaf))
            self._yield("optimizer state", f"its rank is below that of rule {pattern}", leaf.path)
            return []
        for index, axes in enumerate(entries):
            label = labels[index] or f"dimension {index} of size "
            self._check_divides(leaf, label, leaf.shape[index], axes)
        return list(entries)

    def _by_name(self, leaf: Leaf, labels: Names) -> list[Axes]:
        entries: list[Axes] = [()] * len(leaf.shape)
        taken: dict[str, str] = {}
        for index, name in enumerate(labels):
            if name is None or name not in self._declared:
                continue
            for axis in self._declared[name]:
                if axis in taken:
                    raise UserError(_claimed_twice(leaf, labels, taken[axis], name, axis))
                taken[axis] = name
            self._check_divides(leaf, name, leaf.shape[index], self._declared[name])
            entries[index] = self._declared[name]
        for index, name in enumerate(labels):
            if name is not None and name not in self._declared and name in self._defaults:
                entries[index] = self._default(leaf, name, leaf.shape[index], taken)
        return entries

    def _default(self, leaf: Leaf, name: str, size: int, taken: dict[str, str]) -> Axes:
        axes = []
        for axis in self._defaults[name]:
            if axis not in self._sizes:
                continue
            if axis in taken:
                if self._sizes[axis] > 1:
                    self._yield(f"{name}={size}", f"{taken[axis]} already uses {axis}", leaf.path)
                continue
            axes.append(axis)
        count = math.prod(self._sizes[axis] for axis in axes)
        if size % count:
            if name in _OF_DATA:
                self._check_divides(leaf, name, size, tuple(axes))
            self._yield(f"{name}={size}", f"{self._product(axes)} does not divide it", leaf.path)
            return ()
        taken.update(dict.fromkeys(axes, name))
        return tuple(axes)

    def _product(self, axes: Iterable[str]) -> str:
        sizes = [(axis, self._sizes[axis]) for axis in axes]
        written = " x ".join(f"{axis}={size}" for axis, size in sizes)
        return f"{written} = {math.prod(size for _, size in sizes)}" if len(sizes) > 1 else written

    def _check_divides(self, leaf: Leaf, label: str, size: int, axes: Axes) -> None:
        count = math.prod(self._sizes[axis] for axis in axes)
        if size % count:
            where = f"{leaf.path}: " if leaf.path else ""
            what = f"{label}{size}" if label.endswith(" ") else f"{label}={size}"
            nearest_right = nearest_divisors(size, count)
            if label == "sequence":
                nearest_right = nearest_cuts(label, size, count, math.prod(self._sizes.values()))
            raise UserError(f"{where}{self._product(axes)} does not divide {what}; nearest: {nearest_right}")

    def _yield(self, what: str, why: str, path: str) -> None:
        self._yielded.setdefault((what, why), []).append(path)

    def _check_names(
        self, leaves: list[Leaf], found: list[str | None], known: Mapping[str, Names], partial: bool
    ) -> None:
        """Raise UserError if an entry of the names tree names no array, or too few or many dimensions."""
        named: dict[str, list[Leaf]] = {key: [] for key in known}
        for leaf, key in zip(leaves, found, strict=True):
            if key is not None:
                named[key].append(leaf)
        for key, names in known.items():
            if not named[key] and not partial:
                hint = nearest(key, [leaf.path for leaf in leaves])
                raise UserError(f"names has {key!r}, which no array has; {hint}")
            for leaf in named[key]:
                if len(leaf.shape) != len(names) and not leaf.in_record:
                    raise UserError(_misnamed(leaf, names))

    def _check_patterns(self, leaves: list[Leaf]) -> None:
        for key in self._declared:
            if is_pattern(key) and key not in self._matched:
                endings = tree_paths.endings([leaf.path for leaf in leaves], key)
                raise UserError(f"rule {key} matches no array; {nearest(key, endings)}")

    def _check_dimensions(self, present: set[str], named: bool) -> None:
        for key in self._declared:
            if is_pattern(key) or key in present or key in _OF_DATA:
                continue
            if not named:
                raise UserError(
                    f"rule {key} is for a named dimension, but these arrays have no names; "
                    f"give names=, or a path such as '*/{key}'"
                )
            raise UserError(f"rule {key} matches no dimension; {nearest(key, sorted({*present, *_OF_DATA}))}")


def _spec(entries: list[Axes]) -> PartitionSpec:
    from jax.sharding import PartitionSpec

    last = max((index for index, axes in enumerate(entries) if axes), default=-1)
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in entries[: last + 1]))


def _misnamed(leaf: Leaf, names: Names) -> str:
    where = f"{leaf.path}: " if leaf.path else ""
    given = ", ".join(str(name) for name in names)
    return (
        f"{where}{len(names)} dimension names ({given}) for shape {leaf.shape}; give one for each dimension"
    )


def _too_long(pattern: str, entries: tuple[Axes, ...], leaf: Leaf) -> str:
    return (
        f"rule {pattern} has {len(entries)} entries, but {leaf.path} has shape {leaf.shape}; "
        f"give at most {len(leaf.shape)}"
    )


def _claimed_twice(leaf: Leaf, labels: Names, first: str, second: str, axis: str) -> str:
    where = f"{leaf.path}: " if leaf.path else ""
    kept = [axis if index == labels.index(first) else None for index in range(len(labels))]
    written = ", ".join(entry or "null" for entry in kept)
    instead = f"; give the array a rule of its own, such as {leaf.path}: [{written}]" if leaf.path else ""
    return f"{where}{first} and {second} both claim {axis} in one array{instead}"
