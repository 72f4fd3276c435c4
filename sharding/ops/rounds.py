"""Tokens sent to the devices of their experts and back, in rounds of equal sizes until all are sent.

    slots of each peer ─► all-to-all ─► sorted by expert ─► products ─► all-to-all ─► sum

A device sends at most `slots` rows to each other one in a round. What does not fit goes in another, and a
loop runs as many as are needed: how many slots there are decides speed and memory, never values. The first
round is outside of the loop, so that its gradient keeps what it read; later ones, of which there mostly are
none, run again.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..hlo.loops import turns_scope
from .experts import NOTHING, SLACK, ExpertsCall, KeptProducts, taken, through_experts
from .grouped import TILES, by_tiles, collect, inverse, pick, ranks
from .products import grouping_of

# Slots are rounded up to whole tiles of a chip's matrix unit.
_MULTIPLE = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerExchange:
    """An exchange over `axes` of a mesh, of `peers` devices; `everywhere` are all of the mesh's axes.

    `kernel` multiplies what came, interpreted on a CPU where it is a chip's; `kept` names what may be kept of
    it for the backward pass.
    """

    axes: tuple[str, ...]
    peers: int
    everywhere: tuple[str, ...]
    slots: int
    kernel: str = TILES
    interpret: bool = False
    kept: KeptProducts = NOTHING


# Where programs that are traced note the rounds of their exchanges as they run, None for nowhere.
_NOTED: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("noted", default=None)


@contextlib.contextmanager
def noted_rounds() -> Iterator[list[int]]:
    """Give a list in which programs traced within it note each exchange's rounds as they run.

    Every device of this process notes its own, which are alike.
    """
    found: list[int] = []
    before = _NOTED.set(found)
    try:
        yield found
    finally:
        _NOTED.reset(before)


def slots_of(tokens: int, choices: int, peers: int) -> int:
    """Return how many rows a device sends to each of its `peers` in a round.

    The even share and a quarter; for few rows four deviations of what a random router sends, whose variance
    is share · (1 - 1 / peers); never more than there are.

    >>> slots_of(4096, 8, 8), slots_of(16, 2, 8)
    (5120, 32)
    """
    even = tokens * choices / peers
    rows = max(even * SLACK, even + 4 * (even * (1 - 1 / peers)) ** 0.5)
    return min(tokens * choices, -(-int(rows) // _MULTIPLE) * _MULTIPLE)


# Tokens, weights of their choices, and the experts' matrices.
_Floats = tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]


class _Sizes(NamedTuple):
    """What a device knows before it sends, all integers.

    rank, peer: of each choice ``[tokens · choices]``, its place among those that go to its peer, by expert.
    mine: ``[peers, experts of this device]``, how many rows each peer has for each of its experts.
    """

    rank: jax.Array
    peer: jax.Array
    mine: jax.Array


def exchanged(
    call: ExpertsCall,
    exchange: PeerExchange,
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    *matrices: jax.Array,
) -> jax.Array:
    """Return what all experts add to this device's tokens `x` ``[tokens, embed]``.

    `matrices` are those of this device's experts, of which there are as many on each. Runs where all axes of
    the mesh are manual.
    """
    sizes, rounds = _sized(exchange, chosen, matrices[0].shape[0])
    if (noted := _NOTED.get()) is not None:
        jax.debug.callback(lambda count: noted.append(int(count)), rounds)
    floats: Any = (x, weights, matrices)
    found: Any = _later_rounds(call, exchange, floats, sizes, rounds)
    (x, weights, matrices), later = found
    return _one_round(call, exchange, jnp.int32(0), x, weights, matrices, sizes) + later


def _sized(exchange: PeerExchange, chosen: jax.Array, local: int) -> tuple[_Sizes, jax.Array]:
    """Return what is sent, and how many rounds send it: alike on all devices, as each round is collective."""
    flat = chosen.reshape(-1)
    rank, sizes = ranks(flat, exchange.peers * local)
    by_peer = sizes.reshape(exchange.peers, local)
    # The experts of one peer follow each other.
    rank = rank + (jnp.cumsum(by_peer, 1) - by_peer).reshape(-1)[flat]
    every = lax.all_gather(by_peer, exchange.axes)
    most = lax.pmax(every.sum(-1).max(), exchange.everywhere)
    found = _Sizes(rank, flat // local, every[:, lax.axis_index(exchange.axes)])
    return found, -(-most // exchange.slots)


def _one_round(
    call: ExpertsCall,
    exchange: PeerExchange,
    turn: jax.Array,
    x: jax.Array,
    weights: jax.Array,
    matrices: tuple[jax.Array, ...],
    sizes: _Sizes,
) -> jax.Array:
    """Return what the choices of round `turn` add to each token."""
    tokens, choices = weights.shape
    peers, slots = exchange.peers, exchange.slots
    slot = sizes.rank - turn * slots
    place = jnp.where((slot >= 0) & (slot < slots), sizes.peer * slots + slot, peers * slots)
    rows, scale, token = taken(x, weights, inverse(place, peers * slots), place)
    came = _traded(exchange, rows), _traded(exchange, scale)
    given = _by_sender(call, exchange, turn, *came, matrices, sizes, even=tokens * choices)
    return collect(_traded(exchange, given), place.reshape(tokens, choices), token)


def _traded(exchange: PeerExchange, rows: jax.Array) -> jax.Array:
    return lax.all_to_all(rows, exchange.axes, 0, 0, tiled=True)


def _by_sender(
    call: ExpertsCall,
    exchange: PeerExchange,
    turn: jax.Array,
    rows: jax.Array,
    scale: jax.Array,
    matrices: tuple[jax.Array, ...],
    sizes: _Sizes,
    *,
    even: int,
) -> jax.Array:
    """Return rows ``[peers · slots, embed]`` as they came, each through its expert of `matrices`.

    `scale` ``[peers · slots, 1]`` are their weights. Of a router without favourites `even` of them come.
    """
    count = matrices[0].shape[0]
    at = turn * exchange.slots + jnp.arange(exchange.slots)
    ends = jnp.cumsum(sizes.mine, 1)
    # A slot beyond a sender's last row is of no expert.
    experts = (at[None, :, None] >= ends[:, None, :]).sum(-1, dtype=jnp.int32).reshape(-1)
    grouping = grouping_of(
        exchange.kernel, rows.shape[0], count, even=min(even, rows.shape[0]), interpret=exchange.interpret
    )
    place, places, padded = by_tiles(experts, count, grouping.tile)
    row = inverse(place, places)
    laid = (pick(one, row, place[:, None]) for one in (rows, scale))
    return pick(through_experts(call, grouping, exchange.kept, *laid, padded, *matrices), place, row[:, None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _later_rounds(
    call: ExpertsCall, exchange: PeerExchange, floats: _Floats, sizes: _Sizes, rounds: jax.Array
) -> tuple[_Floats, jax.Array]:
    """Return `floats` as they are, and what rounds after the first add.

    The first round reads them as they come from here: its gradients are there where those of later rounds
    are taken, which are added to them, where a sum of their own would be arrays as large as the experts.
    """
    x, weights, matrices = floats

    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        turn, total = carry
        return turn + 1, total + _one_round(call, exchange, turn, x, weights, matrices, sizes)

    start = jnp.int32(1), jnp.zeros_like(x)
    with jax.named_scope(turns_scope(0)):
        return floats, lax.while_loop(lambda carry: carry[0] < rounds, body, start)[1]


def _later_forward(call: ExpertsCall, exchange: PeerExchange, *operands: Any) -> tuple[Any, Any]:
    return _later_rounds(call, exchange, *operands), operands


def _later_backward(call: ExpertsCall, exchange: PeerExchange, kept: Any, gradients: Any) -> Any:
    floats, sizes, rounds = kept
    of_first, gradient = gradients

    def body(carry: Any) -> Any:
        turn, sums = carry
        _, back = jax.vjp(lambda own: _one_round(call, exchange, turn, own[0], own[1], own[2], sizes), floats)
        (found,) = back(gradient)
        return turn + 1, jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, found)

    with jax.named_scope(turns_scope(0)):
        sums = lax.while_loop(lambda carry: carry[0] < rounds, body, (jnp.int32(1), of_first))[1]
    return sums, None, None


_later_rounds.defvjp(_later_forward, _later_backward)
