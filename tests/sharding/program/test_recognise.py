"""What is recognised in traced programs, and the switch for it."""

import dataclasses

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from meshwright.sharding import Plan, UserError, declare, plan
from meshwright.sharding.ops.attention import attention_call
from meshwright.sharding.program.jaxpr import Traced
from meshwright.sharding.program.recognise import FORMS, checked_forms, recognised

PARAMS = {"w": jax.ShapeDtypeStruct((16, 16), jnp.float32)}
BATCH = jax.ShapeDtypeStruct((8, 16), jnp.float32)


def loss(params, batch):
    return jnp.mean((batch @ params["w"]) ** 2)


def test_program_without_a_form_stays_the_object_that_was_traced() -> None:
    jaxpr, result = jax.make_jaxpr(loss, return_shape=True)(PARAMS, BATCH)
    traced = Traced(jaxpr=jaxpr, args=(PARAMS, BATCH), result=result)
    assert recognised(traced) is traced


@pytest.mark.parametrize("which", [FORMS, ("layers",), ()])
def test_switch_is_part_of_the_plan_and_written_only_where_it_is_not_all(which) -> None:
    made = declare(loss, PARAMS, BATCH, topology="cpu:8", mesh={"fsdp": 8}, recognise=which)
    assert made.recognise == which
    assert ("recognise" in made.to_dict()) == (which != FORMS)
    assert Plan.from_dict(made.to_dict()) == made
    found = plan(loss, PARAMS, BATCH, topology="cpu:8", recognise=which)
    assert found.recognise == which


def test_forms_are_in_one_order_and_a_misspelt_one_is_named() -> None:
    assert checked_forms(reversed(FORMS)) == FORMS
    with pytest.raises(UserError, match=r"recognise='layer' is not known; did you mean 'layers'\?"):
        declare(loss, PARAMS, BATCH, topology="cpu:8", mesh={"fsdp": 8}, recognise=["layer"])


def test_fingerprint_is_that_of_what_was_written() -> None:
    jaxpr, result = jax.make_jaxpr(loss, return_shape=True)(PARAMS, BATCH)
    other = jax.make_jaxpr(lambda params, batch: loss(params, batch) + 1)(PARAMS, BATCH)
    traced = Traced(jaxpr=jaxpr, args=(PARAMS, BATCH), result=result)
    assert dataclasses.replace(traced, jaxpr=other, written=jaxpr).fingerprint == traced.fingerprint
    assert dataclasses.replace(traced, jaxpr=other).fingerprint != traced.fingerprint


def attention_calls(jaxpr) -> int:
    inner = [one for eqn in jaxpr.eqns for one in core.jaxprs_in_params(eqn.params)]
    own = sum(attention_call(eqn) is not None for eqn in jaxpr.eqns)
    return own + sum(map(attention_calls, inner))


@pytest.mark.slow
def test_blocks_of_equinox_become_one_scan_with_one_attention() -> None:
    eqx = pytest.importorskip("equinox")
    width, length = 8, 6

    def block(key):
        one, other = jax.random.split(key)
        attention = eqx.nn.MultiheadAttention(2, width, key=one)
        return attention, eqx.nn.LayerNorm(width), eqx.nn.MLP(width, width, 16, 1, key=other)

    model = [block(key) for key in jax.random.split(jax.random.key(0), 4)]
    params, static = eqx.partition(model, eqx.is_inexact_array)
    batch = draws.normal(jax.random.key(1), (3, length, width))

    def run(model, x):
        seen = jnp.tril(jnp.ones((length, length), bool))
        for attention, norm, mlp in model:
            h = jax.vmap(norm)(x)
            x = x + attention(h, h, h, mask=seen)
            x = x + jax.vmap(mlp)(x)
        return x

    def loss(params, batch):
        model = eqx.combine(params, static)
        return jnp.mean(jax.vmap(lambda x: run(model, x))(batch) ** 2)

    jaxpr, result = jax.make_jaxpr(loss, return_shape=True)(params, batch)
    shapes = jax.eval_shape(lambda *args: args, params, batch)
    found = recognised(Traced(jaxpr=jaxpr, args=shapes, result=result))
    inside = [eqn for eqn in found.jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]
    assert len(inside) == 1
    # The first of them reads data alone, and stands before the scan of the others.
    assert attention_calls(found.jaxpr.jaxpr) == 2

    def again(params, batch):
        return core.jaxpr_as_fun(found.jaxpr)(*jax.tree.leaves((params, batch)))[0]

    want, got = (jax.jit(jax.value_and_grad(one))(params, batch) for one in (loss, again))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
