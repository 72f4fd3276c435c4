"""The sizes of groups, told by trying every number that a router can choose.

A router chooses one of a few numbers (an ``argmax``, a ``top_k``; of tokens by themselves the rest of a
division, or what a table that is known says). What each of them is sorted by, and what
it adds to each size, are worked out number by number, however they are written: counted downwards, from 1,
with the place among all packed below, sizes cut out of cumulated ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ....program.pointwise import POINTWISE, SAME, Untold
from ..graph import PartGraph, known_now
from ..values import SUM, Form, Held, Kind, is_alike

# Numbers of a router that are tried, and of groups beside each other.
_MOST = 1 << 12
_MOST_PAIRS = 1 << 22
# Examples whose places are looked at.
_MOST_PLACES = 1 << 25
# What rearranges numbers, and leaves each as often as it was.
_MOVES = ("reshape", "squeeze", "transpose", "broadcast_in_dim", "sort", "gather")
# What adds up of sums what it adds up of their parts.
_LINEAR = (
    *("add", "sub", "neg", "cumsum", "slice", "rev", "concatenate", "reshape", "squeeze"),
    *("broadcast_in_dim", "convert_element_type", "copy", "stop_gradient", "pad"),
)
_COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")


class _RouterChoice(NamedTuple):
    """Where a number was chosen, all that it can be, and what has been made of each."""

    of: Held
    each: np.ndarray


def sizes_of(g: PartGraph, sizes: Held, key: Held) -> Held | None:
    """Return a part's own `sizes` of groups, if they are those that rows sorted by `key` lie in.

    None unless each number that may be chosen counts for one group, groups follow one another as the keys
    do, and what counts for none comes last.
    """
    found = _sorted_by(key)
    if found is None:
        return None
    chosen, keys = found
    linear = _GroupSizes(g, chosen.of, chosen.each)
    table = linear.counted(sizes)
    return linear.own(sizes) if table is not None and _groups_follow(table, keys) else None


def _groups_follow(table: np.ndarray, keys: np.ndarray) -> bool:
    """Whether each row of ``[numbers, groups]`` counts for one group, in the order of `keys`, or comes last.

    Of numbers with the same key it has to be the same group: they lie in any order.
    """
    if table.ndim != 2 or not ((table == 0) | (table == 1)).all() or (table.sum(1) > 1).any():
        return False
    order = np.argsort(keys, kind="stable")
    group = np.where(table.sum(1) == 1, table.argmax(1), table.shape[1])[order]
    steps = np.diff(group)
    return bool((steps >= 0).all() and (steps[np.diff(keys[order]) == 0] == 0).all())


# What numbers are made of


def _sorted_by(key: Held) -> tuple[_RouterChoice, np.ndarray] | None:
    """Return what a key was chosen as, and a number that puts each choice where the key puts it."""
    key = _unmoved(key)
    if _name(key) == "add" and key.op is not None:
        for packed, place in (key.op.ins, key.op.ins[::-1]):
            found, places = _made(packed), _places(place)
            if found is None or places is None or len(found[1]) == 0:
                continue
            apart = np.diff(np.unique(found[1].astype(np.int64))).min(initial=np.iinfo(np.int64).max)
            low, high = int(places.min(initial=0)), int(places.max(initial=0))
            limits, values = np.iinfo(key.dtype), found[1].astype(np.int64)
            fits = values.min() + low >= limits.min and values.max() + high <= limits.max
            if fits and apart > high - low:
                return found
    return _made(key)


def _places(value: Held) -> np.ndarray | None:
    """Return numbers that are known of all examples, as they came."""
    if not _is_whole(value.dtype) or value.form.is_moved:
        return None
    if value.numbers is not None:
        return value.numbers
    return None if value.whole is None else known_now(value.whole, _MOST_PLACES)


def _made(value: Held) -> tuple[_RouterChoice, np.ndarray] | None:
    """Return where the numbers of an array were chosen, and what is made of each that can be."""
    # Where what is farthest back is any number, a choice among few may be made of it on the way.
    return _made_of(value, _root) or _made_of(value, _nearest)


def _made_of(value: Held, source: Callable[[Held], Held]) -> tuple[_RouterChoice, np.ndarray] | None:
    steps: list[tuple[Held, Held]] = []
    while True:
        root = source(_unmoved(value))
        steps.append((_unmoved(value), root))
        if _unmoved(root) is root:
            break
        value = root
    each = _choices(root)
    if each is None:
        return None
    found = each
    for made, of in reversed(steps):
        worked = _worked(made, {of: found}, len(each))
        if worked is None:
            return None
        found = worked
    return _RouterChoice(root, each), found


def _choices(value: Held) -> np.ndarray | None:
    """Return the numbers that a router may choose: those of the array's dimension that it looks along."""
    op, name = value.op, _name(value)
    if op is None or op.eqn is None or not _is_whole(value.dtype):
        return None
    if name in ("argmax", "argmin"):
        count = op.ins[0].shape[op.eqn.params["axes"][0]]
    elif name == "top_k" and op.outs.index(value) == 1:
        count = op.ins[0].shape[op.eqn.params.get("axis", -1)]
    elif name == "rem":
        return _rests(op.ins[1], value.dtype)
    elif name == "gather":
        return _entries(op.eqn, op.ins[0])
    else:
        return None
    return np.arange(count, dtype=value.dtype) if count <= _MOST else None


def _rests(by: Held, dtype: Any) -> np.ndarray | None:
    """Return what a division of whole numbers by a known one may leave, which has the sign of what it was."""
    number = _number(by)
    if number is None or not 0 < number <= _MOST:
        return None
    least = 1 - int(number) if jnp.issubdtype(dtype, jnp.signedinteger) else 0
    return np.arange(least, int(number)).astype(dtype)


def _entries(eqn: Any, table: Held) -> np.ndarray | None:
    """Return what a look-up of single numbers in a known table may give."""
    inside = (jax.lax.GatherScatterMode.CLIP, jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    single = math.prod(eqn.params["slice_sizes"]) == 1
    if table.kind is not Kind.SHARED or not single or eqn.params["mode"] not in inside:
        return None
    found = known_now(table)
    each = None if found is None else np.unique(found)
    return each if each is not None and len(each) <= _MOST else None


def _unmoved(value: Held) -> Held:
    """Return the array that holds the same numbers, as often, before they were moved."""
    while value.op is not None and value.op.eqn is not None and _name(value) in _MOVES:
        op, inner = value.op, value.op.ins[0]
        if _name(value) == "sort":
            inner = op.ins[op.outs.index(value)]
        elif _name(value) == "gather" and not _reads_each_once(value):
            return value
        if math.prod(inner.shape) != math.prod(value.shape) or inner.kind is not Kind.EXAMPLES:
            return value
        value = inner
    return value


def _reads_each_once(value: Held) -> bool:
    """Whether a look-up along the examples, by numbers that a sort has moved, reads each once."""
    assert value.op is not None
    table, at = value.op.ins
    # `arranged` brings the numbers into a part's own examples.
    source = at.op.ins[0] if at.op is not None and at.op.eqn is None and at.op.ins else at
    alone = math.prod(table.shape) == table.shape[table.form.axis]
    numbers = source.numbers
    if not alone or numbers is None or source.form.order is None:
        return False
    return bool((np.sort(numbers) == np.arange(table.shape[table.form.axis])).all())


def _root(value: Held) -> Held:
    """Return the one array of which each number of `value` is made by itself, `value` if there is none."""
    inner = _operands(value)
    if inner is None:
        return value
    roots = {id(root): root for root in map(_root, inner)}
    return next(iter(roots.values())) if len(roots) == 1 else value


def _nearest(value: Held) -> Held:
    """Return the one choice of which each number of `value` is made by itself, `value` if there is none."""
    if _choices(value) is not None:
        return value
    inner = _operands(value)
    roots = {} if inner is None else {id(root): root for root in map(_nearest, inner)}
    return next(iter(roots.values())) if len(roots) == 1 else value


def _operands(value: Held) -> list[Held] | None:
    """Return what an operation on each element takes but for numbers that are known; None for another."""
    op, name = value.op, _name(value)
    if op is None or op.eqn is None or not (name in POINTWISE or name in SAME):
        return None
    inner = [one for one in op.ins if _number(one) is None]
    right = len(op.outs) == 1 and all(
        _is_whole(one.dtype) or one.dtype == jnp.bool_ for one in (*inner, value)
    )
    same = all(one.form == value.form and one.shape == value.shape for one in inner)
    return inner if inner and same and right else None


def _number(value: Held) -> np.ndarray | None:
    """Return the one number that all of an array is, if it is known."""
    whole = value.whole if value.kind is Kind.EXAMPLES else value
    if whole is None or whole.kind is not Kind.SHARED:
        return None
    while (
        whole.shape and _name(whole) in ("broadcast_in_dim", "convert_element_type") and whole.op is not None
    ):
        if not all(is_alike(whole, axis) for axis in range(len(whole.shape))):
            break
        if _name(whole) == "convert_element_type" and whole.op.ins[0].dtype != whole.dtype:
            break
        whole = whole.op.ins[0]
    found = known_now(whole)
    alike = found is not None and found.size > 0 and (found == found.flat[0]).all()
    return found.flat[0] if alike and found is not None and found.dtype.kind in "iub" else None


def _worked(value: Held, known: Mapping[Held, np.ndarray], count: int) -> np.ndarray | None:
    """Return what is made of `count` numbers of the arrays `known`."""
    if value in known:
        return known[value]
    number = _number(value)
    if number is not None:
        return np.full(count, number)
    if value.op is None:
        return None
    ins = [_worked(one, known, count) for one in value.op.ins]
    function = (lambda one: one) if _name(value) in SAME else POINTWISE.get(_name(value))
    if function is None or any(one is None for one in ins):
        return None
    try:
        with np.errstate(all="ignore"):
            return np.asarray(function(*ins)).astype(value.dtype)
    except Untold:
        return None


# What they add to sizes


class _GroupSizes:
    """Sizes as sums over what the numbers `each` of the choices `of` count for."""

    def __init__(self, g: PartGraph, of: Held, each: np.ndarray) -> None:
        self._g, self._of, self._each = g, of, each
        self._own: dict[Held, Held] = {}

    def counted(self, value: Held) -> np.ndarray | None:
        """Return what each number adds to `value`, ``[numbers, …]``, None if it is no sum of that."""
        value = self._before(value)
        op = value.op
        if op is None or not (_is_whole(value.dtype) and jnp.dtype(value.dtype).itemsize >= 4):
            return None
        if value.kind is Kind.SUM and value.combine == "sum":
            leaf = self._leaf(value)
            if leaf is not None:
                return leaf
        if op.eqn is None or _name(value) not in _LINEAR:
            return None
        ins = [self._operand(one) for one in op.ins]
        if any(one is None for one in ins):
            return None
        run = op.eqn.primitive.get_bind_params(op.eqn.params)

        def add(*arrays: Any) -> Any:
            return op.eqn.primitive.bind(*arrays, **run)

        with jax.ensure_compile_time_eval():
            found = jax.vmap(add)(*[jnp.asarray(one) for one in ins])
        return np.asarray(found)

    def own(self, value: Held) -> Held:
        """Return a part's own share of what `counted` gave numbers of."""
        value = self._before(value)
        if value in self._own:
            return self._own[value]
        if value.kind is Kind.SUM:
            return value
        assert value.op is not None
        ins = [one if _nothing(self._before(one)) else self.own(one) for one in value.op.ins]
        self._own[value] = self._g.bind(value.op.eqn, ins, [SUM])[0]
        return self._own[value]

    def _before(self, value: Held) -> Held:
        """Return a sum before it was completed."""
        while True:
            if value.kind is Kind.LATE and value.op is None:
                value = next((one for one, late in self._g.exports.items() if late is value), value)
            if value.op is None or not value.op.is_total:
                return value
            value = value.op.ins[0]

    def _operand(self, value: Held) -> np.ndarray | None:
        """Return what each number adds to an operand; to one that is 0, as sums begin, nothing."""
        if _nothing(self._before(value)):
            return np.zeros((len(self._each), *value.shape), value.dtype)
        return self.counted(value)

    def _leaf(self, value: Held) -> np.ndarray | None:
        find: Callable[[Held], np.ndarray | None] | None = {
            "scatter-add": self._added,
            "reduce_sum": self._compared,
        }.get(_name(value))
        found = None if find is None else find(value)
        return None if found is None else found.astype(value.dtype)

    def _numbers(self, value: Held) -> np.ndarray | None:
        """Return what is made of each choice, of an array that holds all of them once."""
        found = _made(value)
        same = found is not None and found[0].of is self._of
        return found[1].astype(np.int64) if same and found is not None else None

    def _added(self, value: Held) -> np.ndarray | None:
        """Return the table of ones that are added at each example's number."""
        assert value.op is not None
        table, at, new = value.op.ins
        dims, mode = value.op.eqn.params["dimension_numbers"], value.op.eqn.params["mode"]
        whole = table.op.ins[0] if table.op is not None and table.op.eqn is None and table.op.ins else None
        plain = len(value.shape) == 1 and not dims.update_window_dims and at.shape[-1] == 1
        if whole is None or not plain or _number(whole) != 0 or _number(new) != 1:
            return None
        numbers, size = self._numbers(at), value.shape[0]
        if numbers is None or len(numbers) * size > _MOST_PAIRS:
            return None
        if mode == jax.lax.GatherScatterMode.CLIP:
            numbers = np.clip(numbers, 0, size - 1)
        elif mode != jax.lax.GatherScatterMode.FILL_OR_DROP:
            return None
        return numbers[:, None] == np.arange(size)

    def _compared(self, value: Held) -> np.ndarray | None:
        """Return the table of comparisons with known numbers, of which those of all examples are added up."""
        assert value.op is not None
        hot = value.op.ins[0]
        if tuple(value.op.eqn.params["axes"]) != tuple(range(len(hot.shape) - 1)):
            return None
        while _name(hot) in SAME and hot.op is not None and (_is_whole(hot.dtype)):
            hot = hot.op.ins[0]
        name = _name(hot).removesuffix("_to")
        if name not in _COMPARED or hot.op is None or hot.dtype != jnp.bool_:
            return None
        left, right = (self._side(one, hot.form) for one in hot.op.ins)
        if left is None or right is None or left.size * right.size > _MOST_PAIRS:
            return None
        return POINTWISE[name](left, right)

    def _side(self, value: Held, form: Form) -> np.ndarray | None:
        """Return a side of a comparison: ``[numbers, 1]`` of the examples, or ``[1, columns]``."""
        columns = _columns(value)
        if columns is not None:
            return columns[None]
        inner = _alike_last(value)
        found = None if inner is None else self._numbers(inner)
        return None if found is None else found[:, None]


def _nothing(value: Held) -> bool:
    return value.kind is Kind.SHARED and _is_whole(value.dtype) and _number(value) == 0


def _columns(value: Held) -> np.ndarray | None:
    """Return the known numbers along an array's last dimension, which are alike along the others."""
    whole = value.whole or value
    if whole.kind is not Kind.SHARED or not _is_whole(whole.dtype) or not whole.shape:
        return None
    if not all(is_alike(whole, axis) for axis in range(len(whole.shape) - 1)):
        return None
    while _name(whole) == "broadcast_in_dim" and whole.op is not None:
        inner, dims = whole.op.ins[0], whole.op.eqn.params["broadcast_dimensions"]
        last = len(whole.shape) - 1
        if last not in dims or dims[-1] != last or inner.shape[-1] != whole.shape[-1]:
            return None
        whole = inner
    found = known_now(whole)
    if found is None or math.prod(found.shape[:-1]) != 1:
        return None
    return found.reshape(-1).astype(np.int64)


def _alike_last(value: Held) -> Held | None:
    """Return what an array is along all dimensions but the last, along which it is alike."""
    if value.op is not None and _name(value) == "broadcast_in_dim":
        inner, dims = value.op.ins[0], value.op.eqn.params["broadcast_dimensions"]
        last = len(value.shape) - 1
        if math.prod(inner.shape) == math.prod(value.shape[:-1]):
            ends = last not in dims or inner.shape[list(dims).index(last)] == 1
            return inner if ends else None
        return None
    return value if value.shape[-1:] == (1,) else None


def _name(value: Held) -> str:
    op = value.op
    return "" if op is None or op.eqn is None else op.eqn.primitive.name


def _is_whole(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.integer))
