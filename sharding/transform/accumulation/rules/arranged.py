"""Examples that a sort has moved: tokens sorted by their experts, worked on in that order, and put back.

A part sorts its own. Where in the order of all an example comes to lie depends on the others, but not what is
computed of it: what a sort moves has the value of each example, in each part in the order of its own sort
(`Form.order`). What has such an order meets only what has the same one, or is alike for all. Numbers of the
examples that go along (an ``argsort``) are those of the whole batch; as far as they are known by number
(`Held.numbers`), it is told whether each example is looked up by itself. The places themselves
(`Form.places`) differ, and only bring what was moved back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from ....program.pointwise import POINTWISE
from ....program.primitives import Trait, primitives
from ..graph import PartGraph, Rule, known_now, one_of
from ..values import SUM, Form, Held, Kind, NotInParts, Order, examples
from .groups import counts_of
from .tables import sizes_of

_PLACES = NotInParts("the place that a sort gives an example among all is computed with")
# What takes each position by itself, or works along other dimensions, whatever order the examples are in.
_SAFE = (
    (primitives(Trait.ELEMENTWISE) - {"random_gamma"})
    | primitives(Trait.PASSING)
    | {"broadcast_in_dim", "squeeze", "transpose", "dot_general", "top_k", "sort", "gather"}
    | {"custom_jvp_call", "ragged_dot_general"}
    | {"reduce_sum", "reduce_max", "reduce_min", "reduce_or", "reduce_and", "argmax", "argmin", "reduce_prod"}
)
_VIEWS = ("broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "copy", "stop_gradient")
# Numbers of examples that are looked at while reading.
_MOST = 1 << 25


def in_any_order(name: str, rule: Rule) -> Rule:
    """Return the rule of `name` for examples in any order, given the `rule` for those as they came."""
    own = _OWN.get(name)

    def read(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
        found = own(g, eqn, ins) if own is not None else None
        if found is not None:
            return found
        moved = [one for one in ins if one.form.is_moved]
        if not moved and all(one.numbers is None for one in ins):
            return rule(g, eqn, ins)
        if moved and name not in _SAFE and name not in _VIEWS:
            raise NotInParts(f"{name} of examples that a sort has moved is not understood")
        if any(one.form.places is not None for one in moved) and not _is_view(name, eqn):
            raise _PLACES
        outs = rule(g, eqn, ins)
        if len(outs) == 1 and outs[0].kind is Kind.EXAMPLES:
            outs[0].numbers = _numbers(name, eqn, ins, outs[0])
        return outs

    return read


def _is_view(name: str, eqn: core.JaxprEqn) -> bool:
    if name != "convert_element_type":
        return name in _VIEWS
    new = jnp.dtype(eqn.params["new_dtype"])
    return bool(jnp.issubdtype(new, jnp.integer)) and new.itemsize >= 4


# Numbers of examples


def numbers_of(value: Held) -> np.ndarray | None:
    """Return the number of each example, in the order before any sort, where it is known now."""
    if value.numbers is not None or value.form.is_moved or value.whole is None:
        return value.numbers
    if value.kind is not Kind.EXAMPLES or int(np.prod(value.shape)) != value.shape[value.form.axis]:
        return None
    found = known_now(value.whole, _MOST)
    return None if found is None else found.reshape(-1)


# What gives whole numbers of whole numbers.
_NUMBERED = {
    name: POINTWISE[name]
    for name in (
        *("add", "sub", "mul", "div", "rem", "max", "min", "sign"),
        *("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not", "select_n"),
    )
}


def _numbers(name: str, eqn: core.JaxprEqn, ins: Sequence[Held], out: Held) -> np.ndarray | None:
    """Return the numbers of a result, of the operands' numbers."""
    if int(np.prod(out.shape)) != out.shape[out.form.axis]:
        return None
    whole = out.dtype == jnp.bool_ or jnp.issubdtype(out.dtype, jnp.integer)
    if not whole:
        return None
    if name in (*_VIEWS, "transpose"):
        found = numbers_of(ins[0])
        return None if found is None else found.astype(out.dtype)
    function = _NUMBERED.get(name)
    arrays = [_number(one) for one in ins]
    if function is None or any(one is None or one.dtype.kind not in "iub" for one in arrays):
        return None
    if (name in ("div", "rem") and (arrays[1] == 0).any()) or (name == "select_n" and len(arrays) != 3):
        return None
    return np.broadcast_to(function(*arrays).astype(out.dtype), out.shape[out.form.axis])


def _number(value: Held) -> np.ndarray | None:
    if value.kind is Kind.EXAMPLES:
        return numbers_of(value)
    if value.kind is Kind.SHARED and int(np.prod(value.shape)) == 1:
        found = known_now(value)
        return None if found is None else found.reshape(())
    return None


def _counts_up(numbers: np.ndarray | None) -> bool:
    return numbers is not None and bool((numbers == np.arange(len(numbers))).all())


def _part_of(numbers: np.ndarray, size: int, pre: int, parts: int) -> np.ndarray:
    """Return which part has each of some entries of a dimension of ``pre * parts * post``."""
    return numbers // (size // (pre * parts)) % parts


def _each_in_its_part(g: PartGraph, at: Held, numbers: np.ndarray, size: int, pre: int) -> bool:
    """Whether each example's number is an entry of its own part, of a dimension of `size`."""
    if size % (pre * g.parts) or numbers.min(initial=0) < 0 or numbers.max(initial=0) >= size:
        return False
    own = _part_of(np.arange(len(numbers)), len(numbers), at.form.pre, g.parts)
    return bool((_part_of(numbers, size, pre, g.parts) == own).all())


def _within(g: PartGraph, at: Held, size: int, pre: int) -> Held:
    """Return numbers of entries of a dimension of `size` as a part has them."""
    post = size // (pre * g.parts)

    def run(_: object, array: jax.Array) -> list[jax.Array]:
        return [array // (g.parts * post) * post + array % post]

    return g.emit(run, [at], [Held(at.shape, at.dtype, at.form)])[0]


# Sorting, and back


def sort(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held] | None:
    """Read a sort of the examples; None for any other, or of what is made ahead of the data alone."""
    form = one_of(ins).form
    ahead = g.of_data is not None and not any(one.heavy for one in ins)
    if form.axis != eqn.params["dimension"] or ahead:
        return None
    if len(ins[0].shape) != 1 or any(one.kind is Kind.EXAMPLES and one.form != form for one in ins):
        return None
    if form.places is not None:
        raise _PLACES
    alone = eqn.params["num_keys"] == 1 and ins[0].kind is Kind.EXAMPLES
    back = alone and form.order is not None and _counts_up(numbers_of(ins[0]))
    # Whatever rows with the same first key are sorted by, they lie together.
    by_first = ins[0].kind is Kind.EXAMPLES and form.order is None
    order = None if back else Order(key=ins[0] if by_first else None)
    moved = form._replace(order=order)
    ready, forms = [], []
    for one in ins:
        if form.order is not None and back and _is_count(one):
            ready.append(_counted(g, one, form))
            forms.append(moved._replace(places=form.order))
        else:
            ready.append(g.bring(one, form))
            forms.append(moved)
    outs = g.bind(eqn, ready, forms)
    for one, out in zip(ready, outs, strict=True):
        if out.form.places is None:
            out.numbers = numbers_of(one)
    return outs


def _is_count(value: Held) -> bool:
    return value.kind is Kind.SHARED and len(value.shape) == 1 and _counts_up(known_now(value, _MOST))


def _counted(g: PartGraph, like: Held, form: Form) -> Held:
    """Return the places of a part's own examples."""
    size = like.shape[0] // g.parts
    out = Held(like.shape, like.dtype, form._replace(order=None, places=form.order))
    return g.emit(lambda _: [lax.iota(like.dtype, size)], [], [out])[0]


def gather(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held] | None:
    """Read a look-up of examples by numbers that a sort has moved, or among examples that it has."""
    table, at = ins
    if not (table.form.is_moved or at.form.is_moved):
        return None
    dims = eqn.params["dimension_numbers"]
    aval: Any = eqn.outvars[0].aval
    if table.form.places is not None:
        raise _PLACES
    d = table.form.axis
    if table.kind is not Kind.EXAMPLES or d not in (*dims.start_index_map, *dims.operand_batching_dims):
        return None
    if dims.start_index_map != (d,) or dims.collapsed_slice_dims != (d,) or at.kind is not Kind.EXAMPLES:
        raise NotInParts("examples that a sort has moved are looked up at computed places")
    free = [n for n in range(aval.ndim) if n not in dims.offset_dims]
    form = at.form._replace(axis=free[at.form.axis], places=None)
    if at.form.places is not None:
        same = at.form.places is table.form.order and at.form.pre == table.form.pre
        if same and at.shape[at.form.axis] == table.shape[d]:
            return g.bind(eqn, [table, at], [form])
        raise _PLACES
    numbers, size, pre = numbers_of(at), table.shape[d], table.form.pre
    if table.form.order is None and numbers is not None and _each_in_its_part(g, at, numbers, size, pre):
        return g.bind(eqn, [table, _within(g, at, size, pre)], [form])
    raise NotInParts("examples are looked up at computed places")


def scatter(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held] | None:
    """Read writing of examples that a sort has moved: back to their own rows, or to a sum over them."""
    table, at, new = ins
    if not any(one.form.is_moved for one in ins):
        return None
    dims, name = eqn.params["dimension_numbers"], eqn.primitive.name
    if any(one.form.places is not None for one in ins):
        raise _PLACES
    plain = len(dims.scatter_dims_to_operand_dims) == 1 and not dims.operand_batching_dims
    if (
        at.kind is not Kind.EXAMPLES
        or dims.inserted_window_dims != dims.scatter_dims_to_operand_dims
        or not plain
    ):
        raise NotInParts("examples that a sort has moved are written at computed places")
    d = dims.inserted_window_dims[0]
    free = [n for n in range(len(new.shape)) if n not in dims.update_window_dims]
    along = at.form._replace(axis=free[at.form.axis])
    numbers, size = numbers_of(at), table.shape[d]
    unique = numbers is not None and len(np.unique(numbers)) == len(numbers)
    pre = None if numbers is None else _rows_written(g, at, numbers, table, d)
    if pre is None or (name == "scatter" and not unique):
        if name != "scatter-add" or table.kind is Kind.EXAMPLES:
            raise NotInParts("examples are written at computed places")
        return g.bind(eqn, [g.sum(table), at, g.bring(new, along)], [SUM])
    form = examples(d, pre)
    if name == "scatter" and size == at.shape[at.form.axis] and pre == at.form.pre and _is_count(new):
        form = form._replace(places=at.form.order)
        new = _counted(g, new, at.form)
    else:
        new = g.bring(new, along)
    return g.bind(eqn, [g.rows(table, d, pre), _within(g, at, size, pre), new], [form])


def _rows_written(g: PartGraph, at: Held, numbers: np.ndarray, table: Held, d: int) -> int | None:
    """Return how many entries of a table stand before a part, where each example writes to its own part's."""
    size, count, pre = table.shape[d], len(numbers), at.form.pre
    pres = [table.form.pre] if table.kind is Kind.EXAMPLES else [pre, max(pre * size // count, 1)]
    if table.kind is Kind.EXAMPLES and table.form.axis != d:
        return None
    return next((one for one in pres if _each_in_its_part(g, at, numbers, size, one)), None)


def ragged_product(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a product of each group of rows with a matrix of its own, of rows sorted by their groups."""
    rows, weights, sizes = ins[:3]
    names = eqn.params["ragged_dot_dimension_numbers"]
    (contract, _), (batch, _) = names.dot_dimension_numbers
    form = rows.form
    if rows.kind is not Kind.EXAMPLES or list(names.lhs_ragged_dimensions) != [form.axis] or len(ins) > 3:
        raise NotInParts("a grouped product over the examples is not understood")
    if form.axis in (*contract, *batch) or form.order is None:
        raise NotInParts("the groups of a grouped product are not those that the examples are sorted by")
    key = form.order.key
    own = None if key is None else counts_of(g, sizes, key) or sizes_of(g, sizes, key)
    if own is None:
        raise NotInParts("the groups of a grouped product are not counts of what the examples are sorted by")
    free = [n for n in range(len(rows.shape)) if n not in contract and n not in batch]
    out = form._replace(axis=len(batch) + free.index(form.axis))
    return g.bind(eqn, [rows, g.shared(weights), own], [out])


def compare(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held] | None:
    """Read the test of a place, as of any index, for one below 0: none is."""
    place, other = ins
    if place.form.places is None or other.kind is not Kind.SHARED or other.shape != ():
        return None
    number = known_now(other)
    if number is None or number > 0:
        return None
    form, size = place.form._replace(places=None), place.shape
    shape = g.small(size, form.axis)
    out = Held(size, jnp.dtype(bool), form, numbers=np.zeros(size[form.axis], bool))
    return g.emit(lambda _: [jnp.zeros(shape, bool)], [], [out])


def reshape(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held] | None:
    """Read a reshape that leaves the dimension of moved examples as it is."""
    v, sizes = ins[0], eqn.params["new_sizes"]
    if not v.form.is_moved:
        return None
    before, done = int(np.prod(v.shape[: v.form.axis])), 1
    for axis, size in enumerate(sizes):
        if done == before and size == v.shape[v.form.axis] and eqn.params.get("dimensions") is None:
            out = g.bind(eqn, ins, [v.form._replace(axis=axis)], new_sizes=g.small(sizes, axis))
            out[0].numbers = _numbers("reshape", eqn, ins, out[0])
            return out
        done *= size
    raise NotInParts("a reshape groups examples that a sort has moved")


def apart(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held] | None:
    """Read a slice, or some, of other dimensions than that of moved examples: a product's two halves."""
    v, axis = ins[0], ins[0].form.axis
    if not v.form.is_moved:
        return None
    if v.form.places is not None:
        raise _PLACES
    avals: list[Any] = [out.aval for out in eqn.outvars]
    if any(aval.shape[axis] != v.shape[axis] for aval in avals):
        raise NotInParts("some of the examples that a sort has moved are cut out")
    limits = {}
    if eqn.primitive.name == "slice":
        limits["limit_indices"] = g.small(eqn.params["limit_indices"], axis)
    return g.bind(eqn, ins, [v.form] * len(eqn.outvars), **limits)


_OWN: dict[str, Any] = {
    "sort": sort,
    "gather": gather,
    "scatter": scatter,
    "scatter-add": scatter,
    "scatter-mul": scatter,
    "scatter-min": scatter,
    "scatter-max": scatter,
    "lt": compare,
    "reshape": reshape,
    "slice": apart,
    "split": apart,
}
