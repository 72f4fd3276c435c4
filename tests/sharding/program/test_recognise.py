"""What is recognised in traced programs, and the switch for it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from meshwright.sharding import Plan, UserError, declare, plan
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
