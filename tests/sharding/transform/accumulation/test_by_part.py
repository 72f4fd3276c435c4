import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import UserError
from meshwright.sharding.plans.trainable import split
from meshwright.sharding.transform.accumulation.by_part import mean_of_parts
from meshwright.sharding.transform.accumulation.differentiable import differentiable
from meshwright.sharding.transform.compose import with_gradients

pytestmark = pytest.mark.numerics

ROWS = 8


def loss(params, batch):
    """A mean over the rows that count, as a packed language-model loss is a mean over its tokens."""
    error = jnp.square(jnp.tanh(batch["x"] @ params["w"]) - batch["y"]).sum(-1)
    weight = batch["mask"].sum()
    return (error * batch["mask"]).sum() / jnp.maximum(weight, 1), {"weight": weight}


def accumulate(loss, microbatches):
    """Return `loss` with the batch worked through in parts, in both passes."""

    def over(one_part, params, batch):
        return mean_of_parts(
            lambda part: one_part(params, part),
            batch,
            microbatches,
            lambda part: jax.eval_shape(one_part, params, part),
        )

    def gradients(params, batch):
        return with_gradients(loss, split(params, None), batch)

    return differentiable(
        lambda params, batch: over(lambda *part: (loss(*part), None), params, batch)[0],
        lambda params, batch: over(gradients, params, batch),
    )


@pytest.fixture
def params():
    return {"w": draws.normal(jax.random.key(0), (4, 3))}


@pytest.fixture
def batch():
    keys = jax.random.split(jax.random.key(1))
    return {
        "x": draws.normal(keys[0], (ROWS, 4)),
        "y": draws.normal(keys[1], (ROWS, 3)),
        "mask": jnp.array([1.0, 0, 1, 1, 1, 0, 0, 0]),
    }


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_parts_of_unequal_weight_give_the_mean_over_the_whole_batch(params, batch, parts):
    (expected, aux), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    (value, got_aux), got = jax.jit(jax.value_and_grad(accumulate(loss, parts), has_aux=True))(params, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(got["w"], gradients["w"], rtol=1e-5, atol=1e-6)
    assert got_aux["weight"] == aux["weight"] == 4


def test_undifferentiated_loss_has_the_same_value(params, batch):
    np.testing.assert_allclose(accumulate(loss, 4)(params, batch)[0], loss(params, batch)[0], rtol=1e-6)


def test_a_loss_without_aux_stays_without_aux(params, batch):
    value = accumulate(lambda p, b: jnp.square(b["x"] @ p["w"]).mean(), 2)(params, batch)
    np.testing.assert_allclose(value, jnp.square(batch["x"] @ params["w"]).mean(), rtol=1e-6)


def test_a_scaled_loss_scales_its_gradients(params, batch):
    once = jax.jit(jax.grad(lambda p: accumulate(loss, 2)(p, batch)[0]))(params)
    thrice = jax.jit(jax.grad(lambda p: 3 * accumulate(loss, 2)(p, batch)[0]))(params)
    np.testing.assert_allclose(thrice["w"], 3 * once["w"], rtol=1e-6)


def test_parameters_of_integer_type_have_no_gradients(params, batch):
    both = {**params, "steps": jnp.arange(3)}
    once = jax.grad(lambda p: accumulate(loss, 2)(p, batch)[0], allow_int=True)(both)
    assert once["steps"].dtype == jax.dtypes.float0
    np.testing.assert_allclose(
        once["w"], jax.jit(jax.grad(lambda p: loss(p, batch)[0]))(params)["w"], rtol=1e-5
    )


def test_parts_that_do_not_divide_the_batch_are_refused(params, batch):
    with pytest.raises(
        UserError, match="microbatches=3 does not divide the batch of 8 rows; nearest: 2 or 4"
    ):
        accumulate(loss, 3)(params, batch)


def test_numbers_and_keys_are_those_of_every_part(params, batch):
    def noisy(params, batch):
        kept = jax.random.bernoulli(batch["key"], 0.5, (1, batch["x"].shape[1]))
        return batch["scale"] * loss(params, {**batch, "x": batch["x"] * kept})[0]

    batch = {**batch, "mask": jnp.ones(ROWS), "key": jax.random.PRNGKey(0), "scale": jnp.float32(3)}
    got = accumulate(noisy, 2)(params, batch)
    np.testing.assert_allclose(got, noisy(params, batch), rtol=1e-5)


def test_aux_arrays_are_refused_by_name(params, batch):
    def with_array(params, batch):
        value, aux = loss(params, batch)
        return value, {**aux, "errors": batch["x"]}

    with pytest.raises(UserError, match=r"aux 'errors' has shape \(4, 4\)"):
        accumulate(with_array, 2)(params, batch)


def test_gradients_of_the_batch_are_refused(params, batch):
    def of_x(x):
        return accumulate(loss, 2)(params, {**batch, "x": x})[0]

    with pytest.raises(UserError, match="not to the batch"):
        jax.grad(of_x)(batch["x"])


@pytest.mark.numerics(False)
def test_activations_of_one_part_are_held_at_a_time():
    def wide(params, batch):
        return jnp.square(jnp.tanh(batch @ params) @ params.T).mean()

    weights, rows = jnp.ones((64, 256)), jnp.ones((4096, 64))

    def temporary_bytes(parts):
        step = jax.jit(jax.grad(accumulate(wide, parts)))
        return step.lower(weights, rows).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(16) < temporary_bytes(1) / 2
