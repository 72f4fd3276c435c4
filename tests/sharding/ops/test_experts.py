"""Experts against one token at a time, and exchanges in rounds against experts of one device."""

from __future__ import annotations

import functools
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshwright.sharding import UserError
from meshwright.sharding.ops.experts import ExpertsCall, by_expert, experts
from meshwright.sharding.ops.rounds import PeerExchange, exchanged, slots_of

pytestmark = pytest.mark.numerics


def arrays(experts: int = 8, choices: int = 2, rows: int = 8) -> tuple[Any, ...]:
    keys = iter(jax.random.split(jax.random.key(0), 8))
    x = draws.normal(next(keys), (rows, 8, 16))
    # Most tokens like the first experts best.
    scores = draws.normal(next(keys), (rows, 8, experts)) - 1.5 * jnp.arange(experts)
    weights, chosen = jax.lax.top_k(jax.nn.softmax(scores), choices)
    shapes = ((experts, 16, 24), (experts, 24, 16), (experts, 16, 24))
    return (x, weights, chosen, *(draws.normal(next(keys), shape) / 4 for shape in shapes))


def by_token(x: Any, weights: Any, chosen: Any, up: Any, down: Any, gate: Any = None) -> Any:
    """Every expert on every token, of which the chosen ones are added up."""
    wide = jnp.einsum("bse,xef->bsxf", x, up)
    act = jax.nn.silu(jnp.einsum("bse,xef->bsxf", x, gate)) * wide if gate is not None else jax.nn.gelu(wide)
    every = jnp.einsum("bsxf,xfe->bsxe", act, down)
    picked = jnp.take_along_axis(every, chosen[..., None], 2)
    return jnp.einsum("bsk,bske->bse", weights, picked)


def close(got: Any, wanted: Any, bound: float = 2e-6) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(one - other) <= bound * np.linalg.norm(other)


@pytest.mark.parametrize("gated", [True, False])
def test_each_token_gets_what_its_experts_give_and_so_do_gradients(gated: bool) -> None:
    x, weights, chosen, up, down, gate = arrays()
    gates = gate if gated else None
    act = "silu" if gated else "gelu"

    def squares(function: Any, *own: Any) -> Any:
        return jnp.sum(function(*own) ** 2)

    def ours(x: Any, weights: Any, up: Any, down: Any) -> Any:
        return experts(x, weights, chosen, up=up, down=down, gate=gates, activation=act)

    def theirs(x: Any, weights: Any, up: Any, down: Any) -> Any:
        return by_token(x, weights, chosen, up, down, gates)

    own = (x, weights, up, down)
    found = [
        jax.jit(jax.value_and_grad(functools.partial(squares, f), (0, 1, 2, 3)))(*own) for f in (ours, theirs)
    ]
    close(*found)


def test_megablox_multiplies_as_the_loop_over_tiles_does() -> None:
    """Its kernels, interpreted: rows behind the last group, which they leave as they were, are never read."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    x = draws.normal(next(keys), (96, 128))
    scores = draws.normal(next(keys), (96, 4)) - jnp.arange(4.0)
    weights, chosen = jax.lax.top_k(jax.nn.softmax(scores), 2)
    # The third expert gets nothing, and some choices are another device's.
    chosen = jnp.where(chosen == 2, 4, chosen)
    own = (x, weights, *(draws.normal(next(keys), (4, 128, 128)) / 8 for _ in range(3)))
    call = ExpertsCall(activation="silu", gated=True)

    def squares(kernel: str, x: Any, weights: Any, *matrices: Any) -> Any:
        return jnp.sum(by_expert(call, x, weights, chosen, *matrices, kernel=kernel, interpret=True) ** 2)

    kernels = "tiles", "megablox"
    close(*(jax.jit(jax.grad(functools.partial(squares, one), range(5)))(*own) for one in kernels))


@pytest.mark.devices(8)
@pytest.mark.parametrize("slots", [3, pytest.param(16, marks=pytest.mark.slow)])
def test_rounds_of_any_size_send_every_token(slots: int) -> None:
    """Of 16 choices a device most go to one peer: with 3 slots that takes six rounds."""
    x, weights, chosen, *matrices = arrays()
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    call = ExpertsCall(activation="silu", gated=True)
    exchange = PeerExchange(axes=("expert",), peers=4, everywhere=("data", "expert"), slots=slots)

    def local(x: Any, weights: Any, chosen: Any, *matrices: Any) -> Any:
        flat = (y.reshape(-1, y.shape[-1]) for y in (x, weights, chosen))
        return exchanged(call, exchange, *flat, *matrices).reshape(x.shape)

    tokens = P(("data", "expert"))

    def squares(x: Any, weights: Any, *matrices: Any) -> Any:
        out = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(tokens, tokens, tokens, *(P("expert"),) * 3),
            out_specs=tokens,
            check_vma=False,
        )(x, weights, chosen, *matrices)
        return jnp.sum(out**2), out

    def plain(x: Any, weights: Any, up: Any, down: Any, gate: Any) -> Any:
        out = by_token(x, weights, chosen, up, down, gate)
        return jnp.sum(out**2), out

    own, places = (x, weights, *matrices), tuple(range(5))
    found = [jax.jit(jax.grad(f, places, has_aux=True))(*own) for f in (squares, plain)]
    close(*found)


def test_slots_are_the_even_share_and_some_more() -> None:
    assert slots_of(4096, 8, 8) == 5120
    # Of few rows chance takes more, and there are never more than all.
    assert slots_of(64, 2, 4) == 128
    assert slots_of(512, 2, 8) == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "slu"}, "activation='slu' is not known; did you mean 'silu'"),
        ({"up": jnp.ones((8, 15, 24))}, "do not go together; expected x"),
        ({"chosen": jnp.zeros((8, 8, 3), jnp.int32)}, "expected weights and chosen"),
        ({"down": jnp.ones((8, 24, 16), jnp.bfloat16)}, "down is bfloat16 where x is float32; cast it"),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    x, weights, chosen, up, down, _ = arrays()
    given = {"x": x, "weights": weights, "chosen": chosen, "up": up, "down": down}
    with pytest.raises(UserError, match=message):
        experts(**{**given, **changes})


def test_more_choices_than_experts_are_refused() -> None:
    x, _, _, up, down, _ = arrays()
    many = jnp.zeros((8, 8, 9), jnp.int32)
    with pytest.raises(UserError, match="9 choices are more than 8 experts; nearest: 8"):
        experts(x, jnp.ones(many.shape), many, up=up, down=down)
