"""Primitives of a user's own, and those that are not looked into."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.extend import core
from jax.sharding import AxisType, PartitionSpec
from meshwright.sharding.errors import UserError
from meshwright.sharding.program import OpRule, einsum_rule, op_rules, register_op_rule, trace


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(op_rules, "_users", {})


def primitive(name: str):
    made = core.Primitive(name)
    made.def_abstract_eval(lambda x, w: x)
    return lambda x, w: made.bind(x, w)


def dims_around(call):
    program = trace(lambda w, x: call(x * 2, w), jnp.zeros(4), jnp.zeros((6, 4)))
    return program, program.arguments, program.results[0].dims


def test_an_unknown_primitive_is_kept_whole_and_listed():
    program, (w, x), out = dims_around(primitive("mystery"))
    (unknown,) = program.unknown
    assert (unknown.primitive, unknown.count) == ("mystery", 1)
    assert "test_registry" in unknown.where
    assert not {d for c in out for d in c} & {d for c in (*w.dims, *x.dims) for d in c}
    equation = next(e for e in program.equations() if e.primitive == "mystery")
    assert {factor.kind for factor in equation.factors} == {"whole"}
    assert equation.index in program.dims[x.dims[0][0]].whole_at
    assert program.dims[w.dims[0][0]].whole == "mystery needs it whole, and nothing else uses it"


def test_a_registered_rule_is_used():
    register_op_rule("mystery", lambda op: einsum_rule(op, "nd, d -> nd", whole="d"))
    program, (w, x), out = dims_around(primitive("mystery"))
    assert program.unknown == ()
    assert out == x.dims
    assert w.dims == (x.dims[1],)
    assert program.dims[x.dims[0][0]].whole_at == ()
    assert program.dims[x.dims[1][0]].whole_at != ()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda op: einsum_rule(op, "nd -> nd"), "does not fit the operands of mystery"),
        (lambda op: einsum_rule(op, "nd, d nd"), "no '->'"),
        (lambda op: einsum_rule(op, "nd, d -> nd", hole="d"), "did you mean 'whole'"),
        (lambda op: einsum_rule(op, "nd, d -> dn"), r"says \[4, 6\] for result 0, whose shape is \[6, 4\]"),
        (lambda op: OpRule(("map",), (6,), (((0,), ()), ((),)), ()), "describes 0 results, not 1"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(rule, message):
    register_op_rule("mystery", rule)
    with pytest.raises(UserError, match=message):
        dims_around(primitive("mystery"))


def scale(x, w):
    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] * w_ref[...]

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, out_shape=out, name="scale", interpret=True)(x, w)


def test_a_kernel_is_opaque_until_described():
    program, (_, x), out = dims_around(scale)
    assert program.unknown == ()
    assert out[0] != x.dims[0]
    register_op_rule("pallas_call:scale", lambda op: einsum_rule(op, "nd, d -> nd"))
    _, (_, x), out = dims_around(scale)
    assert out == x.dims


def test_a_jitted_function_can_be_one_operation():
    @jax.jit
    def block(x, w):
        return jnp.cumsum(x, axis=0) * w

    register_op_rule("jit:block", lambda op: einsum_rule(op, "nd, d -> nd"))
    program, (_, x), out = dims_around(block)
    assert out == x.dims
    assert [e.primitive for e in program.equations()] == ["mul", "jit"]


def test_a_manual_region_is_opaque():
    mesh = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("a")
    manual = jax.shard_map(lambda x, w: x * w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    program, (_, x), out = dims_around(manual)
    (equation,) = [e for e in program.equations() if e.primitive == "shard_map"]
    assert equation.scopes == ()
    assert {factor.kind for factor in equation.factors} == {"whole"}
    assert out[0] != x.dims[0]
