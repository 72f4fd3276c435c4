"""Array dimensions as products of factors, united and split as a program shows how they relate.

The algebra is the one Shardy propagates shardings with: a dimension of size ``batch * sequence`` is the
factors ``(batch, sequence)``, major to minor, and a reshape only regroups factors. A factor that turns out
to be a product (because something reshapes it) is *split*, everywhere at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# The factors of one array dimension, major to minor; empty for a dimension of size 1.
Seq = tuple[int, ...]


class Factors:
    """Disjoint sets of factors; a set is either atomic or split into a sequence of other factors."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._parts: list[Seq | None] = []

    def new(self, size: int) -> Seq:
        """Return a dimension of `size` that is related to nothing yet."""
        if size == 1:
            return ()
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._parts.append(None)
        return (len(self._parent) - 1,)

    def size(self, factor: int) -> int:
        """Return the size of `factor`."""
        return self._size[self._find(factor)]

    def expand(self, seq: Iterable[int]) -> Seq:
        """Return `seq` as the atomic factors that it is now known to consist of."""
        atoms: list[int] = []
        for factor in seq:
            root = self._find(factor)
            parts = self._parts[root]
            if parts is None:
                atoms.append(root)
            else:
                atoms.extend(self.expand(parts))
        return tuple(atoms)

    def unite(self, left: Seq, right: Seq) -> bool:
        """Make two dimensions one, splitting factors where one is finer than the other.

        Returns False when the two cannot be laid over each other (``3 * 4`` over ``4 * 3``); what comes
        before the place where they part, majors first, is united all the same.
        """
        if left == right:
            return True
        todo_left, todo_right = list(reversed(left)), list(reversed(right))
        while todo_left and todo_right:
            a, b = self._pop(todo_left), self._pop(todo_right)
            if a == b:
                continue
            size_a, size_b = self._size[a], self._size[b]
            if size_a == size_b:
                self._parent[b] = a
            elif size_a > size_b:
                if size_b == 0 or size_a % size_b:
                    return False
                todo_left.append(self._split_off(a, b))
            else:
                if size_a == 0 or size_b % size_a:
                    return False
                todo_right.append(self._split_off(b, a))
        return not todo_left and not todo_right

    def cut(self, seq: Seq, sizes: Sequence[int]) -> list[Seq] | None:
        """Cut a dimension into consecutive pieces of `sizes`, major to minor; None where it has no seam."""
        todo = list(reversed(seq))
        pieces: list[Seq] = []
        for wanted in sizes:
            piece: list[int] = []
            while wanted > 1:
                if not todo:
                    return None
                factor = self._pop(todo)
                size = self._size[factor]
                if size > wanted:
                    if size % wanted:
                        return None
                    (head,) = self.new(wanted)
                    todo.append(self._split_off(factor, head))
                    factor, size = head, wanted
                elif size == 0 or wanted % size:
                    return None
                piece.append(factor)
                wanted //= size
            pieces.append(tuple(piece))
        return None if todo else pieces

    def _find(self, factor: int) -> int:
        parent = self._parent
        while parent[factor] != factor:
            parent[factor] = parent[parent[factor]]
            factor = parent[factor]
        return factor

    def _pop(self, todo: list[int]) -> int:
        """Take the next atomic factor from a reversed sequence."""
        while True:
            root = self._find(todo.pop())
            parts = self._parts[root]
            if parts is None:
                return root
            todo.extend(reversed(parts))

    def _split_off(self, factor: int, major: int) -> int:
        """Split `factor` into `major` and a new minor factor, which is returned."""
        (minor,) = self.new(self._size[factor] // self._size[major])
        self._parts[factor] = (major, minor)
        return minor
