"""What used to give other numbers in parts without a word: the whole batch's now, or one sentence."""

from __future__ import annotations

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_derivatives import linear_call
from meshwright.sharding import UserError, declare

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

ROWS, WIDTH, PARTS = 32, 8, 4


def arguments():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": draws.normal(keys[0], (WIDTH, WIDTH)) / 3}
    return params, {"x": draws.normal(keys[1], (ROWS, WIDTH)), "y": draws.normal(keys[2], (ROWS, WIDTH))}


def declared(loss, batch):
    return declare(loss, arguments()[0], batch, topology="cpu:8", mesh={"data": 8}, microbatches=PARTS)


def check(loss, batch):
    def function(p, b):
        found = loss(p, b)
        return found if isinstance(found, tuple) else (found, {})

    made, params = declared(loss, batch), arguments()[0]
    want = jax.jit(jax.value_and_grad(function, has_aux=True))(params, batch)
    got = jax.jit(jax.value_and_grad(made.apply(function), has_aux=True))(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, want)
    return made


@jax.custom_vjp
def clipped(w):
    return w


clipped.defvjp(lambda w: (w, None), lambda _, g: (jnp.clip(g, -1e-3, 1e-3),))


def out_of_a_loop(p, b):
    h, ws = jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), clipped(p["w"])), b["x"], None, length=2)
    return jnp.square(b["y"] @ ws[0]).mean() + h.mean()


def carried_by_a_loop(p, b):
    def turn(carry, _):
        h, w = carry
        return (jnp.tanh(h @ w), clipped(w)), None

    return jnp.square(jax.lax.scan(turn, (b["x"], p["w"]), None, length=3)[0][0] - b["y"]).mean()


def out_of_a_checkpoint(p, b):
    h, w = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), clipped(w)))(b["x"], p["w"])
    return jnp.square(b["y"] @ w).mean() + h.mean()


def out_of_a_branch(p, b):
    arms = [lambda x, w: (jnp.tanh(x @ w), clipped(w)), lambda x, w: (x @ w, w)]
    h, w = jax.lax.cond(p["w"].sum() > -100, *arms, b["x"], p["w"])
    return jnp.square(b["y"] @ w).mean() + h.mean()


def out_of_a_region(p, b):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, all_ = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    region = jax.shard_map(
        lambda w, x: (jnp.tanh(x @ w), clipped(w)),
        mesh=mesh,
        in_specs=(all_, data),
        out_specs=(data, all_),
        check_vma=False,
    )
    h, w = region(p["w"], b["x"])
    return jnp.square(b["y"] @ w).mean() + h.mean()


@pytest.mark.parametrize(
    "loss",
    [out_of_a_loop, carried_by_a_loop, out_of_a_checkpoint, out_of_a_branch, out_of_a_region],
    ids=lambda loss: loss.__name__,
)
def test_a_clipped_gradient_stays_one_where_its_value_leaves_what_it_was_made_in(loss):
    with pytest.raises(UserError, match=r"is not linear in what comes back .*, at .*test_silent.py:"):
        declared(loss, arguments()[1])


def test_keys_of_other_generators_that_come_with_the_rows_draw_what_they_draw_together():
    def dropped(p, b):
        kept = jax.vmap(lambda key, x: x * jax.random.bernoulli(key, 0.5, x.shape))(b["keys"], b["x"])
        return jnp.square(kept @ p["w"] - b["y"]).mean()

    for kind in ("rbg", "unsafe_rbg", "threefry2x32"):
        keys = jax.random.split(jax.random.key(1, impl=kind), ROWS)
        made = check(dropped, {**arguments()[1], "keys": keys})
        together = [note for note in made.notes if "draw all their numbers together" in note]
        assert len(together) == (kind != "threefry2x32")


def test_numbers_whose_keys_depend_on_parameters_are_refused_unless_each_draws_by_itself():
    def drawn(kind):
        def loss(p, b):
            seeds = jax.lax.stop_gradient(jnp.abs(b["x"] @ p["w"])[:, 0] * 100).astype(jnp.int32)
            keys = jax.vmap(lambda seed: jax.random.key(seed, impl=kind))(seeds)
            noise = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
            return jnp.square((b["x"] + noise) @ p["w"]).mean()

        return loss

    check(drawn("threefry2x32"), {"x": arguments()[1]["x"]})
    with pytest.raises(UserError, match="keys of key<rbg> for each example draw all their numbers together"):
        declared(drawn("rbg"), {"x": arguments()[1]["x"]})


def test_the_largest_of_bools_and_the_bits_of_whole_numbers():
    def loss(p, b):
        h = b["x"] @ p["w"]
        seen = {"any": (h > 1).max(0), "all": (h > -1).min(0)}
        return jnp.square(h).mean() * (1 + (b["y"] > 2).max()), seen

    def of_bits(p, b):
        bits = jax.lax.reduce_or((jnp.abs(b["x"] @ p["w"]) * 10).astype(jnp.int32), (0,))
        return jnp.square(b["x"] @ p["w"]).mean() * (1 + bits.sum())

    check(loss, arguments()[1])
    with pytest.raises(UserError, match="reduce_or of the bits of int32 over the examples, at "):
        declared(of_bits, {"x": arguments()[1]["x"]})


def test_an_array_that_the_loss_does_not_read_is_not_what_comes_in_parts():
    """Labels or images that one objective leaves aside: the rows were taken to be theirs alone."""
    params, rows = arguments()
    unread = {"images": np.zeros((ROWS, 16, WIDTH), np.float32), "ids": np.arange(ROWS)}

    def loss(p, b):
        return jnp.square(jnp.tanh(b["x"] @ p["w"])).mean()

    def running(p, b):
        return jnp.square(jnp.cumsum(b["x"] @ p["w"], axis=0)).mean()

    made = check(jax.jit(loss), {"x": rows["x"], **unread})
    step = jax.make_jaxpr(jax.grad(made.apply(jax.jit(loss))))(params, {"x": rows["x"], **unread})
    assert "scan" in str(step)
    with pytest.raises(UserError, match="along the examples, at "):
        declared(running, {"x": rows["x"], **unread})


def test_one_linear_system_of_all_examples_is_refused_as_that():
    def loss(p, b):
        h = jnp.tanh(b["x"] @ p["w"])
        found, _ = jax.scipy.sparse.linalg.cg(lambda v: h.T @ (h @ v) + v, h.T @ b["y"][:, 0], maxiter=3)
        return jnp.square(h @ found).mean()

    with pytest.raises(UserError, match="one linear system is made of all examples"):
        declared(loss, arguments()[1])


def test_a_written_gradient_of_whole_numbers_is_none():
    @jax.custom_vjp
    def looked_up(table, at):
        return table[at]

    def back(at, g):
        return jnp.zeros((WIDTH, WIDTH)).at[at].add(g), None

    looked_up.defvjp(lambda table, at: (table[at], at), back)

    def loss(p, b):
        return jnp.square(b["x"] @ looked_up(p["w"], jnp.arange(WIDTH)[::-1]) - b["y"]).mean()

    check(loss, arguments()[1])


def by_solver(p, b):
    matrix = p["w"].T @ p["w"] + 0.05 * jnp.eye(WIDTH)
    found, _ = jax.scipy.sparse.linalg.cg(lambda v: matrix @ v, p["w"][0], maxiter=2)
    return jnp.square(b["x"] @ found - b["y"][:, 0]).mean()


def by_transpose(p, b):
    w = linear_call(lambda _, w: w, lambda _, g: jnp.clip(g, -1e-3, 1e-3), (), p["w"])
    return jnp.square(b["x"] @ w - b["y"]).mean()


def by_float8(p, b):
    return jnp.square(b["x"] @ p["w"].astype(jnp.float8_e4m3fn).astype(jnp.float32) - b["y"]).mean()


def by_fewer_bits(p, b):
    return jnp.square(b["x"] @ jax.lax.reduce_precision(p["w"], 5, 2) - b["y"]).mean()


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (by_solver, "a linear system is solved step by step for a gradient"),
        (by_transpose, "is not linear in what comes back"),
        (by_float8, "a gradient is rounded to float8_e4m3fn"),
        (by_fewer_bits, "a gradient is rounded to 2 bits"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_gradient_that_is_none_of_shares_is_not_made_of_them(loss, reason):
    """Solvers that stop when near enough, transposes of one's own, and coarse floats of shared weights."""
    with pytest.raises(UserError, match=rf"{reason}.*each part's share, at .*test_silent.py:"):
        declared(loss, arguments()[1])


def test_linear_gradients_and_those_that_are_stopped_come_in_parts():
    def loss(p, b):
        w = p["w"]
        w = w + jax.lax.stop_gradient(w.astype(jnp.float8_e4m3fn).astype(w.dtype) - w)
        w = linear_call(lambda _, w: w, lambda _, g: 2 * g, (), w)
        w = jnp.linalg.solve(w @ w.T + 3 * jnp.eye(WIDTH), w)
        kept = b["x"] > w[0].astype(jnp.float8_e4m3fn).astype(w.dtype)
        return jnp.square(jnp.where(kept, b["x"], 0) @ w - b["y"]).mean()

    check(loss, arguments()[1])


def test_systems_of_each_example_with_the_same_right_side():
    def loss(p, b):
        matrices = jax.vmap(lambda x: jnp.outer(x, x) + 3 * jnp.eye(WIDTH) + p["w"] @ p["w"].T)(b["x"])
        return jnp.square(jnp.linalg.inv(matrices) @ b["y"][..., None]).mean()

    check(loss, arguments()[1])


def test_a_written_gradient_of_a_function_that_closes_over_constants_is_looked_at():
    """It ended in JAX's traceback about closed-over values."""
    table = np.arange(WIDTH, dtype=np.float32)

    def moved(w, scale):
        return w + scale * table

    def loss(p, b):
        w, _ = jax.lax.scan(lambda w, _: (odd(w), None), p["w"], None, length=2)
        return jnp.square(b["x"] @ w - b["y"]).mean()

    def odd(w):
        closed, consts = jax.closure_convert(lambda w: moved(w, jnp.asarray(table)), w)

        @jax.custom_vjp
        def own(w, *consts):
            return closed(w, *consts)

        own.defvjp(lambda w, *c: (closed(w, *c), None), lambda _, g: (g, *(None for _ in consts)))
        return own(w, *consts)

    check(loss, arguments()[1])


def test_a_written_gradient_that_reads_an_array_around_it_is_told_to_take_it_as_an_argument():
    """It ended in JAX's words about a tracer that has escaped, as it does where the loss is jitted."""

    def loss(p, b):
        @jax.custom_gradient
        def dropped(x):
            kept = jax.random.bernoulli(b["key"], 0.5, x.shape)
            return x * kept, lambda g: 2 * g * kept

        return jnp.square(dropped(b["x"] @ p["w"]) - b["y"]).mean()

    with pytest.raises(
        UserError, match=r"reads an array \(.*\) that .* as an argument, at .*test_silent.py:"
    ):
        declared(loss, {**arguments()[1], "key": jax.random.key(3)})


def test_a_gradient_of_aux_values_is_refused_rather_than_nothing():
    """What an own loop adds to the loss from its aux had no gradient, without a word."""

    def loss(p, b):
        h = jnp.tanh(b["x"] @ p["w"])
        return jnp.square(h - b["y"]).mean(), {"mean": h.mean(), "rows": h.sum(-1), "over": (h > 0).sum()}

    params, batch = arguments()
    planned = declared(loss, batch).apply(loss)

    def added(p):
        number, aux = planned(p, batch)
        return number + 0.1 * aux["mean"]

    def looked_at(function):
        return lambda p: (lambda found: found[0] * jax.lax.stop_gradient(found[1]["mean"]))(
            function(p, batch)
        )

    with pytest.raises(UserError, match=r"beside its number .*add it up in the loss"):
        jax.grad(added)(params)
    want, got = (jax.jit(jax.grad(looked_at(one)))(params) for one in (loss, planned))
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5, atol=1e-6)
    (doubled,) = jax.vjp(lambda p: planned(p, batch), params, has_aux=True)[1](2.0)
    np.testing.assert_allclose(
        doubled["w"], 2 * jax.jit(jax.grad(lambda p: loss(p, batch)[0]))(params)["w"], rtol=1e-4
    )


def test_what_only_prints_is_said_to_be_left_out():
    def loss(p, b):
        h = b["x"] @ p["w"]
        jax.debug.print("mean {}", h.mean())
        return jnp.square(h - b["y"]).mean()

    made = check(loss, arguments()[1])
    (said,) = [note for note in made.notes if "leave out" in note]
    assert "at " in said
    assert "test_silent.py:" in said
