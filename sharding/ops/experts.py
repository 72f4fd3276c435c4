"""A mixture's experts: each token through those its router chose, none dropped, as one equation of a program.

    tokens, choices ─► sorted by expert, padded to tiles ─► grouped products ─► sum of choices

A choice's weight is multiplied into what its expert's last product reads: the sum's gradient needs no result
of that product then, so that none is kept and none is worked out again. Routing is the model's own. The
equation is a jitted function whose body is what one device does by itself: whoever does not know it sees
through it. A plan carries it out where its experts lie (`transform.experts`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from ..errors import UserError, nearest
from .grouped import TILES, Grouping, by_tiles, collect, inverse, pick
from .products import grouped_product, grouping_of

_NAME = "meshwright_experts"

Activation = Literal["silu", "gelu"]

# Rows that a device sends to each other one in a round, over the even share.
SLACK = 1.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsCall:
    """What one call of `experts` asks for, apart from its arrays: x, weights, chosen, up, down (, gate)."""

    activation: Activation
    gated: bool

    @property
    def name(self) -> str:
        """The name of the call's equation, which tells all of it."""
        return f"{_NAME}[{self.activation}{',gated' if self.gated else ''}]"

    @property
    def operands(self) -> int:
        """How many operands the call's equation has."""
        return 5 + self.gated


class KeptProducts(NamedTuple):
    """Names of the products' results that a plan may keep for the backward pass; None: of no name."""

    up: str | None = None
    down: str | None = None
    gate: str | None = None


NOTHING = KeptProducts()


def experts(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    *,
    up: jax.Array,
    down: jax.Array,
    gate: jax.Array | None = None,
    activation: Activation = "silu",
) -> jax.Array:
    """Return the sum over a token's choices of weight · expert(token), ``[batch, sequence, embed]``.

    An expert is down(act(gate(x)) · up(x)), or down(act(up(x))) without a gate. No token is dropped, whatever
    the router chose: products have as many rows as there are choices, and those of padding.

    Args:
        x: ``[batch, sequence, embed]``.
        weights: ``[batch, sequence, choices]``, of each choice; multiplied in `x`'s type, summed in float32.
        chosen: int32 ``[batch, sequence, choices]``, the experts of each token.
        up: ``[experts, embed, mlp]``, of the type of `x`.
        down: ``[experts, mlp, embed]``.
        gate: ``[experts, embed, mlp]``, if there is one.
        activation: ``silu``, or ``gelu`` by its tanh approximation.

    Raises:
        UserError: shapes that do not go together, more choices than experts, an unknown activation.

    >>> x = jnp.ones((1, 2, 4))
    >>> up, down = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 4))
    >>> experts(x, jnp.ones((1, 2, 1)), jnp.array([[[0], [2]]]), up=up, down=down).shape
    (1, 2, 4)
    """
    if activation not in get_args(Activation):
        raise UserError(
            f"activation={activation!r} is not known; {nearest(activation, get_args(Activation))}"
        )
    matrices = [up, down] if gate is None else [up, down, gate]
    _check(x, weights, chosen, *matrices)
    call = ExpertsCall(activation=activation, gated=gate is not None)
    return jitted(call)(x, weights, chosen.astype(jnp.int32), *matrices)


def experts_call(eqn: core.JaxprEqn) -> ExpertsCall | None:
    """Return what `eqn` asks for if it is a call of `experts`, None if it is anything else.

    A call that was batched by `jax.vmap`, or differentiated, is something else.
    """
    call = _CALLS.get(eqn.params.get("name", "")) if eqn.primitive.name == "jit" else None
    if call is None or len(eqn.invars) != call.operands or len(eqn.outvars) != 1:
        return None
    shapes = [tuple(getattr(atom.aval, "shape", ())) for atom in (*eqn.invars, *eqn.outvars)]
    return call if all(len(shape) == 3 for shape in shapes) and shapes[0] == shapes[-1] else None


def activated(call: ExpertsCall, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    """Return act(gate) · up, or act(up) without a gate."""
    act = jax.nn.silu if call.activation == "silu" else functools.partial(jax.nn.gelu, approximate=True)
    return act(up) if gate is None else act(gate) * up


def hidden_rows(
    call: ExpertsCall, up: jax.Array, gate: jax.Array | None, scale: jax.Array | None
) -> jax.Array:
    """Return what the last product reads: `activated`, times `scale` ``[…, 1]`` where that is given.

    Its gradient works it out again from the products' results. To keep what elementwise work gives on the way
    would take as much again as these for each of four values.
    """

    def made(up: jax.Array, gate: jax.Array | None, scale: jax.Array | None) -> jax.Array:
        hidden = activated(call, up, gate)
        return hidden if scale is None else hidden * scale

    return jax.checkpoint(made)(up, gate, scale)


def through_experts(
    call: ExpertsCall,
    grouping: Grouping,
    kept: KeptProducts,
    rows: jax.Array,
    scale: jax.Array,
    sizes: jax.Array,
    *matrices: jax.Array,
) -> jax.Array:
    """Return `rows` ``[rows, embed]``, laid out as `grouping` says, each through the expert of its group.

    `scale` ``[rows, 1]`` are their weights, `sizes` the groups' padded rows, `matrices` up, down and, where
    there is one, gate; `kept` names the results of their products that may be kept for the backward pass.
    """
    up, down, *gate = matrices

    def product(of: jax.Array, matrix: jax.Array, name: str | None) -> jax.Array:
        found = grouped_product(grouping, of, matrix, sizes)
        return found if name is None else checkpoint_name(found, name)

    gated: Any = product(rows, gate[0], kept.gate) if gate else None
    hidden = hidden_rows(call, product(rows, up, kept.up), gated, scale)
    return product(hidden, down, kept.down)


def by_expert(
    call: ExpertsCall,
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    *matrices: jax.Array,
    kernel: str = TILES,
    interpret: bool = False,
    kept: KeptProducts = NOTHING,
    parts: int = 1,
) -> jax.Array:
    """Return what the experts of `matrices` add to tokens `x` ``[tokens, embed]``.

    `weights` and `chosen` are ``[tokens, choices]``; a choice that is none of them (the number of experts)
    adds nothing. They are one of `parts` of all experts, and multiplied by `kernel`; `kept` is as in
    `through_experts`.
    """
    tokens, choices = chosen.shape
    count, total = matrices[0].shape[0], tokens * choices
    grouping = grouping_of(kernel, total, count, even=total / parts, interpret=interpret)
    place, places, sizes = by_tiles(chosen.reshape(-1), count, grouping.tile)
    choice = inverse(place, places)
    rows, scale, token = taken(x, weights, choice, place)
    given = through_experts(call, grouping, kept, rows, scale, sizes, *matrices)
    return collect(given, place.reshape(tokens, choices), token)


def taken(
    x: jax.Array, weights: jax.Array, choice: jax.Array, place: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the rows of `x` ``[tokens, embed]`` and weights that go to places, and the token of each place.

    `choice` ``[places]`` says which choice of `weights` ``[tokens, choices]``, flat, is at each place (their
    number where none is), `place` ``[tokens · choices]`` where each is.
    """
    tokens, choices = weights.shape
    token = jnp.minimum(choice // choices, tokens)
    rows = pick(x, token, place.reshape(tokens, choices))
    # In the type of what they multiply: in float32 libtpu writes arrays of twice the bytes on the way back.
    scale = pick(weights.astype(x.dtype).reshape(-1, 1), choice, place[:, None])
    return rows, scale, token


def dispatch(chosen: jax.Array, count: int, slots: int) -> tuple[jax.Array, jax.Array]:
    """Give each choice one of `slots` of its expert, the first tokens first.

    Args:
      chosen: int32 ``[sequence, choices]``, the experts of each token.
      count: how many experts there are.
      slots: how many tokens each takes.

    Returns:
      The token in each slot, ``[count * slots]``, the sequence's length where there is none; and the slot of
      each choice, ``[sequence, choices]``, ``count * slots`` where there was none left.
    """
    sequence, choices = chosen.shape
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    ordered = flat[order]
    counts = jnp.zeros(count, jnp.int32).at[flat].add(1)
    starts = jnp.cumsum(counts) - counts
    rank = jnp.arange(sequence * choices, dtype=jnp.int32) - starts[ordered]
    slot = jnp.where(rank < slots, ordered * slots + rank, count * slots)
    tokens = jnp.full(count * slots, sequence, jnp.int32).at[slot].set(order // choices, mode="drop")
    places = jnp.zeros(sequence * choices, jnp.int32).at[order].set(slot)
    return tokens, places.reshape(sequence, choices)


def in_slots(
    call: ExpertsCall, x: jax.Array, weights: jax.Array, chosen: jax.Array, *matrices: jax.Array, slots: int
) -> tuple[jax.Array, jax.Array]:
    """Return what `experts` does where an expert takes at most `slots` tokens of a row, and drops the others.

    And which choices it dropped, bool ``[batch, sequence, choices]``. Every shape is known, and products are
    batched ones over the experts.
    """
    tokens, places = jax.vmap(lambda row: dispatch(row, matrices[0].shape[0], slots))(chosen)
    taken = _look_up(x, tokens).reshape(x.shape[0], -1, slots, x.shape[2])
    dropped = places == matrices[0].shape[0] * slots
    return _collected(weights, _batched(call, taken, None, *matrices), places), dropped


_look_up = jax.vmap(lambda rows, index: rows.at[index].get(mode="fill", fill_value=0))


def _batched(call: ExpertsCall, taken: jax.Array, scale: jax.Array | None, *matrices: jax.Array) -> jax.Array:
    """Map ``[batch, experts, slots, embed]`` to the same, every expert its own slots.

    `scale` ``[batch, experts, slots, 1]`` are their weights, where these are not multiplied in later.
    """
    up, down, *gate = matrices
    gated = jnp.einsum("bxce,xef->bxcf", taken, gate[0]) if gate else None
    hidden = hidden_rows(call, jnp.einsum("bxce,xef->bxcf", taken, up), gated, scale)
    return jnp.einsum("bxcf,xfe->bxce", hidden, down)


def _collected(weights: jax.Array, given: jax.Array, places: jax.Array) -> jax.Array:
    """Return the weighted sum of what slots ``[batch, experts, slots, embed]`` give each token."""
    batch, _, _, embed = given.shape
    back = _look_up(given.reshape(batch, -1, embed), places.reshape(batch, -1))
    return jnp.einsum("bsk,bske->bse", weights.astype(given.dtype), back.reshape(*places.shape, embed))


def _balanced(
    call: ExpertsCall,
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    *matrices: jax.Array,
    slots: int,
    room: int,
) -> jax.Array:
    """Return what `experts` does where each expert gets `slots` tokens of a row; `room` travels."""
    batch, sequence, embed = x.shape
    choices = chosen.shape[2]
    tokens, places = jax.vmap(lambda row: dispatch(row, matrices[0].shape[0], room))(chosen)
    sent = jnp.broadcast_to(x[:, :, None], (batch, sequence, choices, embed)).reshape(batch, -1, embed)
    scales = weights.astype(x.dtype).reshape(batch, -1, 1)
    taken, scale = (
        _look_up(one, tokens).reshape(batch, -1, room, one.shape[-1])[:, :, :slots] for one in (sent, scales)
    )
    given = _batched(call, taken, scale, *matrices)
    given = jnp.pad(given, ((0, 0), (0, 0), (0, room - slots), (0, 0))).reshape(batch, -1, embed)
    back = _look_up(given, places.reshape(batch, -1)).reshape(*places.shape, embed)
    return back.astype(jnp.float32).sum(2).astype(x.dtype)


def slots_of_outline(
    x: tuple[int, ...], _: Any, chosen: tuple[int, ...], up: tuple[int, ...], *__: Any
) -> tuple[int, int]:
    """Return how many experts a call of operands of these shapes has, and the rows `outline` gives each."""
    return up[0], max(1, math.ceil(x[1] * chosen[2] / up[0]))


def outline(call: ExpertsCall, *arrays: Any) -> core.ClosedJaxpr:
    """Return a program of the same operands with the work of a balanced router, by which a plan is priced.

    How many rows an expert gets is known only while it runs: here each gets as many as any other. Exchanges
    have room for `SLACK` times as many, there and back; the way back is as wide as the choices, so that the
    way there has the room of both.
    """
    _, slots = slots_of_outline(*(array.shape for array in arrays))
    room = math.ceil(slots * (2 * SLACK - 1))
    return jax.make_jaxpr(functools.partial(_balanced, call, slots=slots, room=room))(*arrays)


# Equation name → call, for every call that was traced in this process.
_CALLS: dict[str, ExpertsCall] = {}


@functools.cache
def jitted(call: ExpertsCall) -> Callable[..., jax.Array]:
    """Return the jitted function that a call is, of its operands in order."""

    def computed(x: jax.Array, weights: jax.Array, chosen: jax.Array, *matrices: jax.Array) -> jax.Array:
        flat = (y.reshape(-1, y.shape[-1]) for y in (x, weights, chosen))
        return by_expert(call, *flat, *matrices).reshape(x.shape)

    computed.__name__ = computed.__qualname__ = call.name
    _CALLS[call.name] = call
    return jax.jit(computed)


def _check(x: Any, weights: Any, chosen: Any, up: Any, down: Any, gate: Any = None) -> None:
    named = {"x": x, "weights": weights, "chosen": chosen, "up": up, "down": down, "gate": gate}
    told = ", ".join(f"{name} {y.shape}" for name, y in named.items() if y is not None)
    if any(y is not None and y.ndim != 3 for y in named.values()):
        raise UserError(f"{told}: each has three dimensions, as the documentation of experts says")
    count, embed, mlp = up.shape
    gates = up if gate is None else gate
    if down.shape != (count, mlp, embed) or gates.shape != up.shape or x.shape[2] != embed:
        raise UserError(
            f"{told} do not go together; expected x [batch, sequence, embed], up and gate "
            "[experts, embed, mlp], down [experts, mlp, embed]"
        )
    if weights.shape != chosen.shape or chosen.shape[:2] != x.shape[:2]:
        raise UserError(f"{told} do not go together; expected weights and chosen [batch, sequence, choices]")
    if chosen.shape[2] > count:
        raise UserError(f"{chosen.shape[2]} choices are more than {count} experts; nearest: {count}")
    for name, matrix in (("up", up), ("down", down), ("gate", gates)):
        if matrix.dtype != x.dtype:
            raise UserError(f"{name} is {matrix.dtype} where x is {x.dtype}; cast it to {x.dtype}")
