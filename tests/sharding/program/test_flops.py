"""Work of equations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import zoo
from meshwright.sharding.program import total_flops, trace, work
from meshwright.sharding.program.flops import matmul_roles


def test_roles_of_a_matmul():
    program = trace(lambda w, x: jnp.einsum("bsd,bdf->bsf", x, w), jnp.zeros((2, 4, 5)), jnp.zeros((2, 3, 4)))
    (dot,) = [e for e in program.equations() if e.primitive == "dot_general"]
    roles = matmul_roles(dot)
    assert roles is not None
    sizes = {role: [f.size for f in getattr(roles, role)] for role in ("batch", "lhs", "rhs", "contracting")}
    assert sizes == {"batch": [2], "lhs": [5], "rhs": [3], "contracting": [4]} or sizes == {
        "batch": [2],
        "lhs": [3],
        "rhs": [5],
        "contracting": [4],
    }
    assert work(dot).flops == 2 * 2 * 3 * 4 * 5
    assert sorted(program.dims[d].size for d in work(dot).dims) == [2, 3, 4, 5]


def test_a_grouped_convolution_counts_its_groups_once():
    def conv(kernel, x):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    program = trace(conv, jnp.zeros((3, 3, 4, 6)), jnp.zeros((5, 8, 8, 8)))
    (equation,) = program.equations()
    assert work(equation).flops == 2 * (5 * 4 * 4 * 6) * (3 * 3 * 4)


def test_a_ragged_matmul_does_not_multiply_by_its_groups():
    program = trace(
        lambda w, x, sizes: jax.lax.ragged_dot(x, w, sizes),
        jnp.zeros((4, 5, 6)),
        jnp.zeros((16, 5)),
        jnp.zeros(4, jnp.int32),
    )
    (equation,) = [e for e in program.equations() if e.primitive == "ragged_dot_general"]
    assert work(equation).flops == 2 * 16 * 5 * 6
    assert program.arguments[0].dims[0][0] in work(equation).dims


def test_a_decoder_costs_twice_its_weights_per_token():
    case = zoo.decoder(scale=16, layers=3)
    program = trace(case.loss, *case.shapes())
    weights = sum(
        a.shape[-1]
        * a.shape[-2]
        * (1 if len(a.shape) < 3 else a.shape[0])
        * (a.shape[1] if len(a.shape) == 4 else 1)
        for a in program.parameters
        if len(a.shape) > 1 and "norm" not in a.path and a.path != "embedding"
    )
    matmuls = sum(work(e).flops * e.multiplicity for e in program.equations() if work(e).unit == "matmul")
    attention = 3 * 2 * 2 * 8 * 24 * 24 * 16 * 128
    assert matmuls == 2 * weights * 8 * 24 + attention
    assert matmuls < total_flops(program) < 1.2 * matmuls


def test_only_the_largest_arm_of_a_condition_counts():
    def loss(w, x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    program = trace(loss, jnp.zeros((4, 4)), jnp.zeros((3, 4)))
    assert total_flops(program) - 2 * 2 * 3 * 4 * 4 < 10
