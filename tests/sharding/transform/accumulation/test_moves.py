"""Moves of arrays under microbatches: of other dimensions values are kept, of examples they are refused."""

from __future__ import annotations

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import UserError, declare
from meshwright.sharding.program.jaxpr import Traces
from meshwright.sharding.transform.accumulation.proof import in_parts

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

ROWS, TIME, WIDTH = 16, 4, 8


def arguments():
    params = {"w": draws.normal(jax.random.key(0), (WIDTH, WIDTH)) / 2, "at": jnp.array(1.0)}
    return params, {"x": draws.normal(jax.random.key(1), (ROWS, TIME, WIDTH))}


def hidden(p, b):
    return b["x"] @ p["w"]


def place(p):
    """Return a place that is known when the step runs."""
    return jnp.int32(jax.lax.stop_gradient(p["at"]))


def drawn(x):
    return x @ jnp.swapaxes(x, -1, -2) + 9 * jnp.eye(TIME)


# What is done with other dimensions than the examples'.
MOVES = {
    "reshape": lambda p, h: h.reshape(ROWS, TIME * WIDTH)[:, 3],
    "rows and time as one": lambda p, h: jnp.tanh(h.reshape(ROWS * TIME, WIDTH)),
    "reshape in another order": lambda p, h: (
        jax.lax.reshape(h, (WIDTH, ROWS * TIME), dimensions=(2, 0, 1)) * jnp.arange(ROWS * TIME)
    ),
    "squeeze": lambda p, h: jnp.squeeze(h[None, :, :1], (0, 2)),
    "transpose": lambda p, h: h.transpose(2, 0, 1) * jnp.arange(1.0, TIME + 1),
    "rev": lambda p, h: jnp.flip(h, 1) * jnp.arange(WIDTH),
    "pad": lambda p, h: jnp.pad(h, ((0, 0), (1, 2), (0, 0)), constant_values=0.5) ** 2,
    "slice": lambda p, h: h[:, 1::2],
    "dynamic slice": lambda p, h: jax.lax.dynamic_slice_in_dim(h, place(p), 2, axis=1),
    "dynamic update": lambda p, h: (
        jax.lax.dynamic_update_slice_in_dim(h, h[:, :2] * 2, place(p), axis=1) ** 2
    ),
    "cumulative sum": lambda p, h: jnp.cumsum(h, 1) ** 2,
    "sort": lambda p, h: jnp.sort(h, -1) * jnp.arange(WIDTH),
    "concatenate": lambda p, h: jnp.concatenate([h, 2 * h], 1) ** 2,
    "stack": lambda p, h: jnp.stack([h, h * h], 0) ** 2,
    "tile": lambda p, h: jnp.tile(h, (1, 2, 1)) ** 2,
    "matrices": lambda p, h: jnp.linalg.cholesky(drawn(h)),
    "one matrix for all": lambda p, h: jax.scipy.linalg.solve_triangular(
        jnp.tril(p["w"]) + 3 * jnp.eye(WIDTH), h.reshape(-1, WIDTH).T, lower=True
    ),
    "one system for all": lambda p, h: (
        jnp.linalg.solve(p["w"] + 3 * jnp.eye(WIDTH), h.reshape(-1, WIDTH).T) ** 2
    ),
    "window": lambda p, h: jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 1), (1, 1, 1), "VALID"),
    "window of one's own": lambda p, h: jax.lax.reduce_window(
        jax.lax.stop_gradient(h), -jnp.inf, jnp.logaddexp, (1, 2, 1), (1, 1, 1), "VALID"
    ),
    "reduced by a function of one's own": lambda p, h: jax.lax.reduce(
        jax.lax.stop_gradient(h), -jnp.inf, jnp.logaddexp, (1,)
    ),
    "the largest, perhaps": lambda p, h: jax.lax.approx_max_k(h, 2)[0],
    "fft": lambda p, h: jnp.abs(jnp.fft.rfft(h, axis=1)) ** 2,
    "none of the rows": lambda p, h: jnp.concatenate([h[:0], h, jnp.zeros((0, TIME, WIDTH))]) ** 2,
    "split into none and all": lambda p, h: jnp.concatenate(jnp.split(h * h, [0, ROWS])[::-1]),
    "taken from what all share": lambda p, h: p["w"].at[jnp.arange(ROWS) % 3].subtract(h[:, 0]) ** 2,
}


def of_groups(h):
    """Return a convolution whose result has a row for one of each of two groups of rows."""
    names, kernel = ("NHC", "HIO", "NHC"), jnp.ones((2, WIDTH, 4))
    return jax.lax.conv_general_dilated(
        h, kernel, (1,), "VALID", dimension_numbers=names, batch_group_count=2
    )


# What is done with the examples themselves, and a part of what is said of it.
MEETINGS = {
    "rev": (lambda p, h: h * jnp.flip(h, 0), "reversed"),
    "pad": (lambda p, h: jnp.pad(h, ((1, 0), (0, 0), (0, 0)))[:-1] * h, "padding moves"),
    "slice": (lambda p, h: h[1:] * h[:-1], "cut out"),
    "dynamic slice": (lambda p, h: jax.lax.dynamic_slice_in_dim(h, place(p), 8) ** 2, "cut out"),
    "dynamic update": (
        lambda p, h: jax.lax.dynamic_update_slice_in_dim(h, jnp.ones((2, TIME, WIDTH)), place(p), 0),
        "written",
    ),
    "cumulative sum": (lambda p, h: jnp.cumsum(h, 0) ** 2, "along the examples"),
    "sort": (lambda p, h: jnp.sort(h, 0) * jnp.arange(ROWS)[:, None, None], "along the examples"),
    "matrices": (lambda p, h: jnp.linalg.cholesky(h[:, 0] @ h[:, 0].T + 9 * jnp.eye(ROWS)), "example"),
    "window": (
        lambda p, h: jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (2, 1, 1), (1, 1, 1), "VALID"),
        "window",
    ),
    "reduced by a function of one's own": (
        lambda p, h: jax.lax.reduce(jax.lax.stop_gradient(h), -jnp.inf, jnp.logaddexp, (0,)),
        "a function of one's own over the examples",
    ),
    "convolution of groups of rows": (lambda p, h: of_groups(h) ** 2, "one of each of 2 groups of examples"),
    "fft": (lambda p, h: jnp.abs(jnp.fft.rfft(h[..., 0], axis=0)) ** 2, "examples"),
}


def assert_kept(loss, layout):
    """Hold the value, each number beside it and the gradient under `layout` to those of `loss` itself."""
    (value, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(*arguments())
    apply = layout.apply(loss)
    (got, got_aux), got_gradient = jax.jit(jax.value_and_grad(apply, has_aux=True))(*arguments())
    np.testing.assert_allclose(got, value, rtol=2e-6)
    for name in aux:
        np.testing.assert_allclose(got_aux[name], aux[name], rtol=5e-6, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(got_gradient["w"], gradient["w"], rtol=1e-5, atol=1e-5)


def test_moves_of_other_dimensions_keep_values():
    def loss(p, b):
        means = {name: jnp.mean(move(p, hidden(p, b))) for name, move in MOVES.items()}
        return sum(means.values()), means

    assert_kept(loss, declare(loss, *arguments(), topology="cpu:8", mesh={"data": 8}, microbatches=2))


@pytest.mark.parametrize("gives", [jax.lax.optimization_barrier, jax.device_put], ids=["barrier", "put"])
def test_extremes_that_go_along_with_examples_stay_extremes(gives):
    """They were added up over the parts."""

    def loss(p, b):
        h = hidden(p, b)
        h, top, all_of = gives((h, jnp.max(b["x"], 0), jax.lax.stop_gradient(h > -1).all(0)))
        return jnp.square(h - top).mean(), {"top": top.sum(), "all": all_of.sum()}

    def learnt(p, b):
        h, top = gives((hidden(p, b), hidden(p, b).max((0, 1))))
        return jnp.square(h - 1).mean() + jnp.square(top).sum(), {}

    assert_kept(loss, declare(loss, *arguments(), topology="cpu:8", mesh={"data": 8}, microbatches=2))
    layout = declare(learnt, *arguments(), topology="cpu:8", mesh={"data": 8}, microbatches=2, max_passes=5)
    assert_kept(learnt, layout)


def test_a_maximum_that_is_infinite_is_learnt_from():
    """Columns without an example that counts: what a maximum of -inf adds to a sum was not a number."""

    def loss(p, b):
        h = jnp.where(jnp.arange(WIDTH) > 2, hidden(p, b), -jnp.inf)
        return jnp.exp(h.max((0, 1))).sum(), {}

    assert_kept(loss, declare(loss, *arguments(), topology="cpu:8", mesh={"data": 8}, microbatches=2))


def test_the_key_of_one_example_serves_all():
    params, batch = arguments()
    batch["keys"] = jax.random.split(jax.random.key(2), ROWS)

    def loss(p, b):
        noise = jax.random.normal(b["keys"][0], (TIME, WIDTH))
        return jnp.square(hidden(p, b) + noise).mean()

    layout = declare(loss, params, batch, topology="cpu:8", mesh={"data": 8}, microbatches=2)
    want, got = (jax.jit(jax.grad(one))(params, batch)["w"] for one in (loss, layout.apply(loss)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MEETINGS)
def test_moves_of_the_examples_are_refused(name):
    move, words = MEETINGS[name]

    def loss(p, b):
        return jnp.mean(move(p, hidden(p, b)))

    with pytest.raises(UserError, match=words) as caught:
        declare(loss, *arguments(), topology="cpu:8", mesh={"data": 8}, microbatches=2)
    assert "test_moves.py:" in str(caught.value)


# What rows that follow one another do in groups of four.
IN_GROUPS = {
    "best of four": lambda z: jnp.sort(z, 1)[:, 2:].mean(),
    "sums so far": lambda z: jnp.mean(jnp.cumsum(z, 1) ** 2),
    "the first against the others": lambda z: jnp.mean((z[:, :1] - z[:, 1:]) ** 2),
    "a softmax over the group": lambda z: jnp.mean(jax.nn.log_softmax(z)[:, 0]),
    "pairs": lambda z: jnp.mean(jax.nn.softplus(z[:, :, None] - z[:, None])),
}


def in_groups(p, b):
    scores = jnp.tanh(hidden(p, b)).sum((1, 2)).reshape(-1, 4)
    values = {name: said(scores) for name, said in IN_GROUPS.items()}
    return sum(values.values()), values


@pytest.mark.once("sharding/transform/accumulation/test_moves.py")
def test_rows_that_meet_in_groups_stay_together():
    """By stride they would be sent to parts of their own: refused, or several passes for a softmax."""
    layout = declare(in_groups, *arguments(), topology="cpu:8", mesh={"fsdp": 8}, microbatches=2)
    assert not [note for note in layout.notes if "passes" in note or "whole batch" in note]
    assert_kept(in_groups, layout)


def test_as_few_rows_stay_together_as_meet():
    """Then the fewest rows leave the devices that they lie on."""
    read = in_parts(Traces(in_groups).on(*arguments()), 2)
    assert (read.pre, read.parts, read.rows) == (2, 2, ROWS)
    alone = in_parts(Traces(lambda p, b: jnp.mean(hidden(p, b))).on(*arguments()), 2)
    assert (alone.pre, alone.moves_rows) == (ROWS // 2, False)


def test_groups_that_parts_would_cut_are_refused():
    with pytest.raises(UserError, match=r"microbatches=8 would change the result: .* at .*test_moves.py:"):
        declare(in_groups, *arguments(), topology="cpu:1", mesh={"data": 1}, microbatches=8)


@pytest.mark.slow
@pytest.mark.numerics(False)
def test_rows_of_a_group_move_once_before_the_parts():
    layout = declare(in_groups, *arguments(), topology="cpu:8", mesh={"data": 8}, microbatches=2)
    params, batch = arguments()
    batch = jax.device_put(batch, layout.shardings(batch, layout.make_mesh(), "batch"))
    text = jax.jit(jax.grad(lambda p, b: layout.apply(in_groups)(p, b)[0])).lower(params, batch).compile()
    moved = [line for line in text.as_text().splitlines() if " all-to-all(" in line]
    assert moved
    assert not [line for line in moved if "while/body" in line]
