"""Losses with a manual region of their own (`jax.shard_map`), worked through in parts."""

from __future__ import annotations

import functools

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshwright.sharding import UserError, declare

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

ROWS, WIDTH = 32, 8
DATA = P("data")


def arguments():
    keys = jax.random.split(jax.random.key(0), 7)
    params = {"w": draws.normal(keys[0], (WIDTH, WIDTH)), "v": draws.normal(keys[1], (WIDTH, WIDTH))}
    params["layers"] = [draws.normal(key, (WIDTH, WIDTH)) for key in keys[2:4]]
    batch = {"x": draws.normal(keys[4], (ROWS, WIDTH)), "y": draws.normal(keys[5], (ROWS, WIDTH))}
    return params, {**batch, "mask": (draws.normal(keys[6], (ROWS,)) > 0) * 1.0}


def over(function, ins, outs, **how):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    return jax.shard_map(function, mesh=mesh, in_specs=ins, out_specs=outs, **how)


def masked(p, b):
    def own(w, x, y, mask):
        losses = jnp.square(jnp.tanh(x @ w) - y).mean(-1)
        total = jax.lax.psum((losses * mask).sum(), "data") / jax.lax.psum(mask.sum(), "data")
        return total, jax.lax.pmean(losses.mean(), "data")

    found = over(own, (P(), DATA, DATA, DATA), (P(), P()))(p["w"], b["x"], b["y"], b["mask"])
    return found[0] + 0.5 * found[1]


def over_tensor(p, b):
    def own(w, v, x):
        return jax.lax.psum(jnp.tanh(x @ w) @ v, "tensor")

    specs = (P(None, "tensor"), P("tensor", None), DATA)
    return jnp.square(over(own, specs, DATA)(p["w"], p["v"], b["x"]) - b["y"]).mean()


def exchanged(p, b):
    def own(w, x, y):
        w = jax.lax.all_gather(w, "data", tiled=True)
        h = jax.lax.all_to_all(jnp.tanh(x @ w), "data", 1, 0, tiled=True)
        h = jax.lax.all_to_all(h * (1 + jax.lax.axis_index("data")), "data", 0, 1, tiled=True)
        h = h + 0.5 * jax.lax.ppermute(h, "data", [(n, (n + 1) % 4) for n in range(4)])
        place = jnp.arange(x.shape[0]) + x.shape[0] * jax.lax.axis_index("data")
        every = jax.lax.all_gather(y, "data", tiled=True)
        return h * (1 + place[:, None]) / 8, jax.nn.logsumexp(h @ every.T, -1)

    found = over(own, (DATA, DATA, DATA), (DATA, DATA), check_vma=False)(p["w"], b["x"], b["y"])
    return jnp.square(found[0] - b["y"]).mean() + found[1].mean()


def layers(p, b):
    def own(weights, x):
        for w in weights:
            x = x + jnp.tanh(x @ w)
        return x

    return jnp.square(over(own, (P(), DATA), DATA)(p["layers"], b["x"]) - b["y"]).mean()


def along_tensor_alone(p, b):
    def own(w, v, x):
        return jax.lax.psum(jnp.tanh(x @ w) @ v, "tensor")

    region = over(own, (P(None, "tensor"), P("tensor", None), P()), P(), axis_names={"tensor"})
    return jnp.square(region(p["w"], p["v"], b["x"]) - b["y"]).mean()


@jax.custom_vjp
def entered(x):
    return x


@jax.custom_vjp
def left(x):
    return jax.lax.psum(x, "tensor")


entered.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.psum(g, "tensor"),))
left.defvjp(lambda x: (left(x), None), lambda _, g: (g,))


def written_by_hand(p, b):
    """A layer that is cut along `tensor`, between functions whose gradients say what devices exchange."""

    def own(w, v, x):
        return left(jnp.tanh(entered(x) @ w) @ v)

    specs = (P(None, "tensor"), P("tensor", None), DATA)
    return jnp.square(over(own, specs, DATA, check_vma=False)(p["w"], p["v"], b["x"]) - b["y"]).mean()


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))


def derived(p, b):
    """Derivatives that are written for functions, where JAX checks over which devices values differ."""

    def own(w, x):
        return sine(jax.nn.relu(x @ w))

    return over(own, (P(), DATA), DATA)(p["w"], b["x"]).mean()


def check(parts, *losses, max_passes=3):
    def together(p, b):
        found = {loss.__name__: loss(p, b) for loss in losses}
        return sum(found.values()), found

    rows = arguments()
    layout = declare(
        together, *rows, topology="cpu:8", mesh={"data": 8}, microbatches=parts, max_passes=max_passes
    )
    (value, aux), gradient = jax.jit(jax.value_and_grad(together, has_aux=True))(*rows)
    (got, got_aux), found = jax.jit(jax.value_and_grad(layout.apply(together), has_aux=True))(*rows)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), got_aux, aux)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, gradient)
    return layout


def test_parts_give_what_the_whole_batch_does():
    check(2, masked, layers, written_by_hand, derived)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 4])
def test_whatever_devices_exchange(parts):
    check(parts, over_tensor, exchanged, along_tensor_alone, layers)


def statistics_of_all_devices(p, b):
    def own(w, x):
        h = x @ w
        mean = jax.lax.pmean(h.mean(0), "data")
        square = jax.lax.pmean(jnp.square(h - mean).mean(0), "data")
        return (h - mean) * jax.lax.rsqrt(square + 0.1)

    return jnp.square(over(own, (P(), DATA), DATA)(p["w"], b["x"]) - b["y"]).mean()


def largest_of_all_devices(p, b):
    def own(w, v, x):
        h = jnp.tanh(x @ w)
        largest = jax.lax.pmax(jnp.abs(jax.lax.stop_gradient(h)).max(), ("data", "tensor"))
        return jax.lax.psum(h / jax.lax.stop_gradient(largest) @ v, "tensor")

    specs = (P(None, "tensor"), P("tensor", None), DATA)
    return jnp.square(over(own, specs, DATA, check_vma=False)(p["w"], p["v"], b["x"]) - b["y"]).mean()


def neighbours_of_the_data(p, b):
    def own(w, x):
        before = jax.lax.ppermute(x[-1:], "data", [(n, (n + 1) % 4) for n in range(4)])
        return jnp.tanh((x + jnp.concatenate([before, x[:-1]])) @ w)

    return jnp.square(over(own, (P(), DATA), DATA)(p["w"], b["x"]) - b["y"]).mean()


def test_what_devices_complete_among_each_other_is_completed_between_passes():
    layout = check(4, statistics_of_all_devices, largest_of_all_devices, max_passes=6)
    assert sum("what all its devices do together" in note for note in layout.notes) == 2


def test_rows_that_devices_hand_to_each_other_are_made_before_the_parts():
    check(4, neighbours_of_the_data)


def centred(x):
    return x - jax.lax.pmean(x.mean(0), "data")


@jax.custom_vjp
def product(x, w, _):
    return x @ w


product.defvjp(
    lambda x, w, number: (product(x, w, number), (x, w)),
    lambda kept, g: (g @ kept[1].T, 2 * kept[0].T @ g, None),
)


@jax.custom_vjp
def bounded(x):
    return x


bounded.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1e-4, 1e-4),))


@jax.custom_vjp
def entered_all(x):
    return x


entered_all.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.pmean(g, "data"),))


def derivatives_of_ones_own(p, b, **how):
    """Derivatives that are written for functions, behind sums over all devices, of weights on each."""

    def own(w, v, x):
        h = jax.checkpoint(jax.nn.relu)(centred(x @ w))
        return sine(product(h, jax.lax.pcast(v, "data", to="varying") if not how else v, 3)) + jax.nn.relu6(h)

    return jnp.square(over(own, (P(), P(), DATA), DATA, **how)(p["w"], p["v"], b["x"]) - b["y"]).mean()


def loops_and_branches(p, b, **how):
    def own(w, weights, x):
        turn = jax.checkpoint(lambda h, w: (sine(jax.nn.silu(h @ w)), h.sum()))
        h = jax.lax.scan(turn, centred(x @ w), jnp.stack(weights))[0]
        h = jax.lax.cond(jax.lax.axis_index("data") % 2 == 0, jax.nn.relu, jnp.tanh, h)
        far = jax.lax.while_loop(lambda s: jnp.abs(s).max() > 1, lambda s: s / 2, jax.lax.stop_gradient(h))
        return h * jax.lax.stop_gradient(far)

    region = over(own, (P(), P(), DATA), DATA, **how)
    return jnp.square(region(p["w"], p["layers"], b["x"]) - b["y"]).mean()


@pytest.mark.parametrize("how", [{}, {"check_vma": False}], ids=["checked", "unchecked"])
def test_derivatives_loops_and_branches_behind_sums_of_all_devices(how):
    one = functools.wraps(derivatives_of_ones_own)(functools.partial(derivatives_of_ones_own, **how))
    other = functools.wraps(loops_and_branches)(functools.partial(loops_and_branches, **how))
    layout = check(4, one, other, max_passes=9)
    assert sum("what all its devices do together" in note for note in layout.notes) == 2


@pytest.mark.parametrize("function", [bounded, entered_all], ids=["clips", "exchanges"])
def test_a_gradient_that_is_one_devices_own_is_not_taken_for_all(function):
    def loss(p, b):
        region = over(lambda w, x: function(centred(x @ w)), (P(), DATA), DATA, check_vma=False)
        return jnp.square(region(p["w"], b["x"]) - b["y"]).mean()

    with pytest.raises(
        UserError, match=r"comes back to them inside of a loop or call, at .*test_regions.py:"
    ):
        declare(loss, *arguments(), topology="cpu:8", mesh={"data": 8}, microbatches=2, max_passes=9)


def gathered_pairs(p, b):
    """Each example of one array beside every one of another, as CLIP's towers are over devices."""

    def own(w, v, x, y):
        every = jax.lax.all_gather(y @ v, "data", tiled=True)
        number = jnp.arange(x.shape[0]) + x.shape[0] * jax.lax.axis_index("data")
        losses = -jnp.take_along_axis(jax.nn.log_softmax(x @ w @ every.T), number[:, None], 1)
        return jax.lax.pmean(losses.mean(), "data")

    return over(own, (P(), P(), DATA, DATA), P())(p["w"], p["v"], b["x"], b["y"])


def test_an_array_of_rows_that_each_part_reads_whole_is_said():
    layout = check(2, gathered_pairs)
    (note,) = (note for note in layout.notes if "each part reads it whole" in note)
    assert "batch 'y' is as long as the batch" in note
    assert "cut like the rows, every example meets every other, at " in note


def test_a_sum_that_comes_back_to_the_rows_in_a_loop_inside_is_refused():
    def loss(p, b):
        def own(w, x):
            def step(h, _):
                h = h @ w
                return jnp.tanh(h - jax.lax.pmean(h.mean(0), "data")), None

            return jax.lax.scan(step, x, None, length=2)[0]

        return over(own, (P(), DATA), DATA)(p["w"], b["x"]).mean()

    with pytest.raises(
        UserError, match=r"comes back to them inside of a loop or call, at .*test_regions.py:"
    ):
        declare(loss, *arguments(), topology="cpu:8", mesh={"data": 8}, microbatches=2)
