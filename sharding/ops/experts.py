"""A mixture's experts: each token through those its router chose, none dropped, as one equation of a program.

    tokens, choices ─► sorted by expert, padded to tiles ─► grouped products ─► weighted sum of choices

Routing is the model's own. The equation is a jitted function whose body is what one device does by itself:
whoever does not know it sees through it. A plan carries it out where its experts lie
(`transform.experts`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.extend import core

from ..errors import UserError, nearest
from .grouped import TILES, Grouping, by_tiles, inverse, pick
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
        weights: ``[batch, sequence, choices]``, of each choice; the sum is float32.
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


def through_experts(
    call: ExpertsCall, grouping: Grouping, rows: jax.Array, sizes: jax.Array, *matrices: jax.Array
) -> jax.Array:
    """Return `rows` ``[rows, embed]``, laid out as `grouping` says, each through the expert of its group.

    `sizes` are the groups' padded rows, `matrices` up, down and, where there is one, gate.
    """
    up, down, *gate = matrices
    product = functools.partial(grouped_product, grouping)
    gated: Any = product(rows, gate[0], sizes) if gate else None
    hidden = activated(call, product(rows, up, sizes), gated)
    return product(hidden, down, sizes)


def by_expert(
    call: ExpertsCall,
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    *matrices: jax.Array,
    kernel: str = TILES,
    interpret: bool = False,
    parts: int = 1,
) -> jax.Array:
    """Return what the experts of `matrices` add to tokens `x` ``[tokens, embed]``.

    `weights` and `chosen` are ``[tokens, choices]``; a choice that is none of them (the number of experts)
    adds nothing. They are one of `parts` of all experts, and multiplied by `kernel`.
    """
    tokens, choices = chosen.shape
    count, total = matrices[0].shape[0], tokens * choices
    grouping = grouping_of(kernel, total, count, even=total / parts, interpret=interpret)
    place, places, sizes = by_tiles(chosen.reshape(-1), count, grouping.tile)
    choice, place = inverse(place, places), place.reshape(tokens, choices)
    rows = pick(x, jnp.minimum(choice // choices, tokens), place)
    rows = pick(through_experts(call, grouping, rows, sizes, *matrices), place, choice[:, None])
    return combined(weights, rows).astype(x.dtype)


def combined(weights: jax.Array, rows: jax.Array) -> jax.Array:
    """Return the weighted sum of a token's rows ``[tokens, choices, embed]``, float32."""
    return jnp.einsum("tk,tkd->td", weights.astype(jnp.float32), rows.astype(jnp.float32))


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
    return _collected(weights, _batched(call, taken, *matrices), places), dropped


_look_up = jax.vmap(lambda rows, index: rows.at[index].get(mode="fill", fill_value=0))


def _batched(call: ExpertsCall, taken: jax.Array, *matrices: jax.Array) -> jax.Array:
    """Map ``[batch, experts, slots, embed]`` to the same, every expert its own slots."""
    up, down, *gate = matrices
    gated = jnp.einsum("bxce,xef->bxcf", taken, gate[0]) if gate else None
    hidden = activated(call, jnp.einsum("bxce,xef->bxcf", taken, up), gated)
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
    taken = _look_up(sent, tokens).reshape(batch, -1, room, embed)[:, :, :slots]
    given = _batched(call, taken, *matrices)
    return _collected(weights, jnp.pad(given, ((0, 0), (0, 0), (0, room - slots), (0, 0))), places)


def outline(call: ExpertsCall, *arrays: Any) -> core.ClosedJaxpr:
    """Return a program of the same operands with the work of a balanced router, by which a plan is priced.

    How many rows an expert gets is known only while it runs: here each gets as many as any other. Exchanges
    have room for `SLACK` times as many, there and back; the way back is as wide as the choices, so that the
    way there has the room of both.
    """
    x, _, chosen, up, *_ = arrays
    slots = max(1, math.ceil(x.shape[1] * chosen.shape[2] / up.shape[0]))
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
