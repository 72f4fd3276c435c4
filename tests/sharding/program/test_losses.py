"""Losses over a whole vocabulary are worked through in chunks of positions, and keep their values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core
from meshwright.sharding import declare
from meshwright.sharding.program.forms import losses
from meshwright.sharding.program.jaxpr import Traced
from meshwright.sharding.program.recognise import recognised

pytestmark = pytest.mark.numerics

ROWS, LENGTH, WIDTH, VOCABULARY = 8, 24, 16, 96


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(losses, "WHOLE_BATCH", 4096)
    monkeypatch.setattr(losses, "ROW_CHUNK", 256)


def arrays(length=LENGTH, vocabulary=VOCABULARY):
    draw = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(draw.normal(size=(WIDTH, WIDTH)), jnp.float32) * 0.3,
        "head": jnp.asarray(draw.normal(size=(WIDTH, vocabulary)), jnp.float32) * 0.3,
        "bias": jnp.linspace(-1.0, 1.0, vocabulary),
    }
    batch = {
        "x": jnp.asarray(draw.normal(size=(ROWS, length, WIDTH)), jnp.float32),
        "targets": jnp.asarray(draw.integers(0, vocabulary, (ROWS, length)), jnp.int32),
    }
    return params, batch


def hidden(params, batch):
    return jnp.tanh(batch["x"] @ params["in"])


def by_optax(params, batch):
    logits = hidden(params, batch) @ params["head"] + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def shifted(params, batch):
    logits = jax.nn.log_softmax((hidden(params, batch) @ params["head"]).astype(jnp.float32)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logits, batch["targets"][:, 1:, None], -1))


def one_hot(params, batch):
    logits = jnp.einsum("bsd,dv->bsv", hidden(params, batch), params["head"])
    smooth = 0.9 * jax.nn.one_hot(batch["targets"], VOCABULARY) + 0.1 / VOCABULARY
    return optax.softmax_cross_entropy(5.0 * jnp.tanh(logits / 5.0), smooth).mean()


def flat_and_more(params, batch):
    """Positions in one dimension, a masked mean, a loss on the partition, and the accuracy besides."""
    logits = hidden(params, batch).reshape(-1, WIDTH) @ params["head"]
    targets = batch["targets"].reshape(-1)
    highest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    partition = jnp.log(jnp.exp(logits - highest).sum(-1)) + highest[:, 0]
    counted = (targets > 4).astype(jnp.float32)
    loss = partition - jnp.take_along_axis(logits, targets[:, None], 1)[:, 0] + 1e-3 * partition**2
    return jnp.sum(loss * counted) / counted.sum(), jnp.mean(logits.argmax(-1) == targets)


def picked(params, batch):
    """One entry of each position's, by vmapped indexing."""
    logits = jax.nn.log_softmax(hidden(params, batch) @ params["head"])
    return -jax.vmap(jax.vmap(lambda row, target: row[target]))(logits, batch["targets"]).mean()


def merged_and_picked(params, batch):
    """Positions laid end to end after the product, with a bias before, entries picked by rows' numbers."""
    logits = (hidden(params, batch) @ params["head"] + params["bias"]).reshape(-1, VOCABULARY)
    targets = batch["targets"].reshape(-1)
    each = jax.nn.logsumexp(logits, -1) - logits[jnp.arange(len(targets)), targets]
    return jnp.sum(each.reshape(ROWS, LENGTH) * jnp.linspace(0.0, 1.0, LENGTH)) / ROWS


def merged_without_the_last(params, batch):
    logits = (hidden(params, batch) @ params["head"])[:, :-1].reshape(-1, VOCABULARY)
    targets = batch["targets"][:, 1:].reshape(-1)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def rows_and_columns(params, batch):
    logits = jax.nn.log_softmax(hidden(params, batch) @ params["head"])
    return -logits[jnp.arange(ROWS)[:, None], jnp.arange(LENGTH)[None], batch["targets"]].mean()


def multiplied(params, batch):
    """One-hot targets in a product, at each position and over all of them."""
    logits = jax.nn.log_softmax(hidden(params, batch) @ params["head"])
    targets = jax.nn.one_hot(batch["targets"], VOCABULARY)
    return -jnp.einsum("bsv,bsv->bs", targets, logits).mean()


def multiplied_whole(params, batch):
    logits = jax.nn.log_softmax(hidden(params, batch) @ params["head"])
    return -jnp.einsum("bsv,bsv->", jax.nn.one_hot(batch["targets"], VOCABULARY), logits) / ROWS


def summed_whole(params, batch):
    """Positions and vocabulary in one sum, with a mask of positions."""
    logits = jax.nn.log_softmax(hidden(params, batch) @ params["head"])
    counted = (batch["targets"] > 4)[..., None]
    return -jnp.sum(logits * jax.nn.one_hot(batch["targets"], VOCABULARY) * counted) / counted.sum()


PLAIN = [by_optax, shifted, one_hot, flat_and_more]
INDEXED = [picked, merged_and_picked, merged_without_the_last, rows_and_columns]
SUMMED = [multiplied, multiplied_whole, summed_whole]


def parts(params, batch):
    def add(total, part):
        return total + by_optax(params, part), None

    halves = jax.tree.map(lambda one: one.reshape(2, ROWS // 2, *one.shape[1:]), batch)
    return jax.lax.scan(jax.checkpoint(add), 0.0, halves)[0]


def traced(loss, *args) -> Traced:
    jaxpr, result = jax.make_jaxpr(loss, return_shape=True)(*args)
    return Traced(jaxpr=jaxpr, args=args, result=result)


def largest(jaxpr: core.Jaxpr) -> int:
    """Return how many numbers the largest array of a program has, bodies included."""
    inner = [one for eqn in jaxpr.eqns for one in core.jaxprs_in_params(eqn.params)]
    own = [int(np.prod(var.aval.shape)) for eqn in jaxpr.eqns for var in eqn.outvars]
    return max([*own, *(largest(one) for one in inner)])


@pytest.mark.parametrize("loss", [*PLAIN, *INDEXED, *SUMMED, parts])
def test_loss_never_has_all_logits_and_keeps_values_and_gradients(loss) -> None:
    params, batch = arrays()
    one = traced(loss, params, batch)
    found = recognised(one, ("losses",))
    assert largest(one.jaxpr.jaxpr) == ROWS * LENGTH * VOCABULARY // (2 if loss is parts else 1)
    assert largest(found.jaxpr.jaxpr) <= ROWS * LENGTH * VOCABULARY // 2 // (2 if loss is parts else 1)
    assert found.notes == ()

    def value(run, params):
        leaves = jax.tree.leaves(run(params))
        return leaves[0], leaves[1:]

    def again(params):
        return core.jaxpr_as_fun(found.jaxpr)(*jax.tree.leaves((params, batch)))

    runs = [
        jax.jit(jax.value_and_grad(lambda p, run=run: value(run, p), has_aux=True))
        for run in (lambda p: loss(p, batch), again)
    ]
    plain, mine = (run(params) for run in runs)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(mine), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def test_other_uses_of_logits_are_left_with_a_note() -> None:
    def distilled(params, batch):
        weights = jax.nn.softmax(hidden(params, batch) @ params["head"])
        return jnp.mean((weights @ params["head"].T) ** 2)

    params, batch = arrays()
    one = traced(distilled, params, batch)
    found = recognised(one, ("losses",))
    assert found.jaxpr is one.jaxpr
    (note,) = found.notes
    assert "test_losses.py" in note
    assert "dot_general reads its logits otherwise than by position; its logits take 72.0 KiB" in note


def test_rows_picked_in_another_order_are_no_positions() -> None:
    def turned(params, batch):
        logits = jax.nn.log_softmax((hidden(params, batch) @ params["head"]).reshape(-1, VOCABULARY))
        count = len(logits)
        return -logits[jnp.arange(count)[::-1], batch["targets"].reshape(-1)].mean()

    params, batch = arrays()
    one = traced(turned, params, batch)
    found = recognised(one, ("losses",))
    assert found.jaxpr is one.jaxpr
    assert "gather reads its logits otherwise than by position" in " ".join(found.notes)


def test_chunks_of_a_loop_that_somebody_has_chosen_are_left(monkeypatch) -> None:
    params, batch = arrays()
    monkeypatch.setattr(losses, "ROW_CHUNK", LENGTH * VOCABULARY)
    one = traced(parts, params, batch)
    assert recognised(one, ("losses",)) is one


def test_small_logits_and_layers_are_left_without_a_word(monkeypatch) -> None:
    params, batch = arrays()
    monkeypatch.setattr(losses, "WHOLE_BATCH", ROWS * LENGTH * VOCABULARY)
    one = traced(by_optax, params, batch)
    assert recognised(one, ("losses",)) is one


@pytest.mark.once("sharding/program/test_losses.py")
@pytest.mark.numerics(False)
@pytest.mark.devices(8)
def test_planned_loss_on_several_devices_is_the_plain_one_and_takes_less_memory(monkeypatch) -> None:
    monkeypatch.setattr(losses, "ROW_CHUNK", 1 << 13)
    params, batch = arrays(length=128, vocabulary=1024)
    mesh, rules = {"fsdp": 4, "tensor": 2}, {"*head": ["fsdp", "tensor"], "*bias": ["tensor"]}
    temporary = {}
    expected = jax.jit(jax.value_and_grad(by_optax))(params, batch)
    for which in (("losses",), ()):
        made = declare(by_optax, params, batch, topology="cpu:8", mesh=mesh, rules=rules, recognise=which)
        devices = made.make_mesh()
        planned = made.apply(by_optax, devices)
        laid = (
            jax.device_put(params, made.shardings(params, devices)),
            jax.device_put(batch, made.shardings(batch, devices, "batch")),
        )
        compiled = jax.jit(jax.value_and_grad(planned)).lower(*laid).compile()
        value, gradients = compiled(*laid)
        temporary[which] = compiled.memory_analysis().temp_size_in_bytes
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        for name, one in gradients.items():
            np.testing.assert_allclose(one, expected[1][name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert temporary["losses",] < temporary[()]
