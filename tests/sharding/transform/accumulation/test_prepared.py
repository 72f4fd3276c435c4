"""Rows of the data that meet before the model: made of the whole batch ahead, and exact in parts."""

from __future__ import annotations

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.sharding import UserError, declare

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

ROWS, WIDTH, CLASSES = 16, 8, 5


def arguments():
    params = {"w": draws.normal(jax.random.key(0), (WIDTH, WIDTH)) / 2}
    batch = {
        "x": draws.normal(jax.random.key(1), (ROWS, WIDTH)),
        "reward": draws.normal(jax.random.key(2), (ROWS,)),
        "class": jnp.arange(ROWS) * 3 % CLASSES,
        "near": jnp.arange(ROWS) * 7 % 11,
        "key": jax.random.key(3),
    }
    return params, batch


def scores(p, x, classes):
    return optax.softmax_cross_entropy_with_integer_labels(jnp.tanh(x @ p["w"])[:, :CLASSES], classes)


def mixup(p, b):
    to = jax.random.permutation(b["key"], ROWS)
    mixed = 0.7 * b["x"] + 0.3 * b["x"][to]
    losses = 0.7 * scores(p, mixed, b["class"]) + 0.3 * scores(p, mixed, b["class"][to])
    return losses.mean(), {"to": to, "mixed": mixed}


def ranks(p, b):
    rank = jnp.argsort(jnp.argsort(b["reward"])) / (ROWS - 1.0) - 0.5
    return (rank * scores(p, b["x"], b["class"])).mean(), {"median": jnp.median(b["reward"])}


def returns(p, b):
    def turn(later, reward):
        return reward + 0.9 * later, reward + 0.9 * later

    found = jax.lax.scan(turn, 0.0, b["reward"], reverse=True)[1]
    return (found * scores(p, b["x"], b["class"])).mean(), {"cumulative": jnp.cumsum(b["reward"])}


def alike(p, b):
    """As many of a row's class as the batch has weigh it, and a neighbour pulls at it."""
    weight = 1 / (b["class"][:, None] == b["class"]).sum(1)
    pull = jnp.mean((jnp.tanh(b["x"] @ p["w"]) - b["x"][b["near"]]) ** 2)
    return (weight * scores(p, b["x"], b["class"])).mean() + pull, {}


LOSSES = [mixup, ranks, returns, alike]


def together(p, b):
    found = {loss.__name__: loss(p, b) for loss in LOSSES}
    return sum(value for value, _ in found.values()), found


def test_what_depends_on_no_parameter_is_made_before_the_parts():
    layout = declare(together, *arguments(), topology="cpu:8", mesh={"fsdp": 8}, microbatches=2)
    (note,) = [note for note in layout.notes if "before its 2 parts" in note]
    assert "sort along the examples, at " in note
    assert "test_prepared.py:" in note
    (value, aux), gradient = jax.jit(jax.value_and_grad(together, has_aux=True))(*arguments())
    apply = layout.apply(together)
    (got, got_aux), got_gradient = jax.jit(jax.value_and_grad(apply, has_aux=True))(*arguments())
    np.testing.assert_allclose(got, value, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-6, atol=1e-6), got_aux, aux)
    np.testing.assert_allclose(got_gradient["w"], gradient["w"], rtol=1e-5, atol=1e-5)


def pairs(p, b):
    """Ranks over the batch weigh differences within pairs of rows that follow one another."""
    rank = jnp.argsort(jnp.argsort(b["reward"])) / (ROWS - 1.0)
    better, worse = scores(p, b["x"], b["class"]).reshape(-1, 2).T
    return (jax.nn.softplus(better - worse) * jnp.abs(rank.reshape(-1, 2) @ jnp.array([1.0, -1]))).mean()


def check_same(loss, layout):
    params, batch = arguments()
    value, gradient = jax.jit(jax.value_and_grad(loss))(params, batch)
    got, got_gradient = jax.jit(jax.value_and_grad(layout.apply(loss)))(params, batch)
    np.testing.assert_allclose(got, value, rtol=2e-6)
    np.testing.assert_allclose(got_gradient["w"], gradient["w"], rtol=1e-5, atol=1e-6)


PAIRS = {"topology": "cpu:2", "mesh": {"data": 2}, "microbatches": 2}


def test_rows_may_be_in_groups_besides():
    check_same(pairs, declare(pairs, *arguments(), **PAIRS))


def test_devices_work_their_own_rows_through_and_the_estimate_has_what_is_made():
    def loss(p, b):
        order = jnp.argsort(b["reward"])
        return scores(p, b["x"][order], b["class"][order]).mean() * jnp.sort(b["reward"])[:3].mean()

    how = {"topology": "cpu:4", "mesh": {"data": 4}}
    layout = declare(loss, *arguments(), **how, microbatches=2)
    # Of 16 rows four lie on a device: 8 floats and a number each; and the sorted rewards are whole or so too.
    rows = (ROWS // 4) * (WIDTH + 1) * 4
    assert rows <= layout.estimate.memory["prepared"] <= rows + ROWS * 8
    assert "prepared" not in declare(loss, *arguments(), **how).estimate.memory
    check_same(loss, layout)
    gradients = jax.make_jaxpr(jax.grad(layout.apply(loss)))(*arguments())
    assert "shard_map" in str(gradients)


def test_rows_that_are_cut_unevenly_are_said_to_be_worked_on_at_once():
    def loss(p, b):
        rows, classes = (jnp.array_split(b[n], 3) for n in ("x", "class"))
        found = [scores(p, *cut) for cut in zip(rows, classes, strict=True)]
        return sum(one.sum() for one in found) / ROWS

    layout = declare(loss, *arguments(), topology="cpu:2", mesh={"data": 2}, microbatches=4)
    assert any(note.endswith("of some rows alone is computed at once") for note in layout.notes)
    check_same(loss, layout)
    assert not any("at once" in note for note in declare(pairs, *arguments(), **PAIRS).notes)


def test_the_new_state_may_be_made_so_too():
    def loss(p, b, state):
        key, drawn = jax.random.split(state["key"])
        to = jax.random.permutation(drawn, ROWS)
        found = scores(p, b["x"][to], b["class"][to]).mean()
        return found, ({}, {"key": key, "best": jnp.sort(b["reward"])[-3:] + state["best"]})

    params, batch = arguments()
    state = {"key": jax.random.key(4), "best": jnp.zeros(3)}
    how = {
        "topology": "cpu:8",
        "mesh": {"data": 8},
        "microbatches": 2,
        "state": jax.eval_shape(lambda: state),
    }
    layout = declare(loss, params, batch, **how)
    value, (_, new) = loss(params, batch, state)
    got, (_, got_new) = jax.jit(layout.apply(loss))(params, batch, state)
    np.testing.assert_allclose(got, value, rtol=2e-6)
    np.testing.assert_allclose(got_new["best"], new["best"], rtol=2e-6)
    assert (jax.random.key_data(got_new["key"]) == jax.random.key_data(new["key"])).all()


def test_what_a_parameter_gives_is_refused():
    def loss(p, b):
        to = jax.random.permutation(b["key"], ROWS)
        hidden = jnp.tanh(b["x"] @ p["w"])
        return jnp.mean(hidden * hidden[to])

    with pytest.raises(UserError, match=r"looked up at computed places, at .*test_prepared.py:"):
        declare(loss, *arguments(), topology="cpu:8", mesh={"data": 8}, microbatches=2)


def test_what_is_many_times_the_batch_is_refused():
    def loss(p, b):
        far = jnp.sort(jnp.broadcast_to(b["reward"][:, None], (ROWS, 1 << 17)), 0)
        return jnp.mean(far.mean(1) * scores(p, b["x"], b["class"]))

    with pytest.raises(UserError, match=r"sort along the examples, at .*test_prepared.py:"):
        declare(loss, *arguments(), topology="cpu:8", mesh={"data": 8}, microbatches=2)
