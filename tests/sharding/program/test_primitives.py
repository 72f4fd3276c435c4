"""The table of traits has every primitive that there is a rule for, and says what it really is."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.sharding import PartitionSpec
from meshwright.sharding.program import trace, work
from meshwright.sharding.program.op_rules import builtin_rules
from meshwright.sharding.program.primitives import Trait, primitives, traits

# Traits that a generation of JAX, its first two numbers, has no primitive for.
ABSENT = {
    "0.10": {"log2", "one_minus_square", "polynomial", "relayout"},
    "0.11": {"call", "closed_call", "core_map", "polynomial"},
    "0.12": {"call", "closed_call", "core_map"},
}

# Where primitives are made that `import jax` alone does not make.
HOMES = (
    "jax.custom_batching",
    "jax.experimental.custom_partitioning",
    "jax.experimental.pallas",
    "jax.export",
    "jax.random",
    "jax.scipy.special",
    "jax._src.cudnn.fused_attention_stablehlo",
    "jax._src.cudnn.scaled_matmul_stablehlo",
    "jax._src.lax.eval_jaxpr",
)


def existing() -> set[str]:
    """Names of the primitives of the JAX that is here."""
    for name in HOMES:
        importlib.import_module(name)
    return {one.name for one in gc.get_objects() if isinstance(one, core.Primitive)}


def test_every_primitive_with_a_rule_has_its_traits() -> None:
    without_rule = set(traits()) - set(builtin_rules())
    assert set(builtin_rules()) <= set(traits())
    assert without_rule == primitives(Trait.CALL) | primitives(Trait.CONTROL)


def test_no_trait_is_of_a_primitive_that_there_is_not() -> None:
    assert set(traits()) - existing() == ABSENT[".".join(jax.__version__.split(".")[:2])]


def test_a_primitive_of_one_kind_is_of_no_other() -> None:
    kinds = (Trait.PRODUCT, Trait.MOVE, Trait.CALL, Trait.CONTROL)
    for first in kinds:
        for second in kinds:
            assert first is second or not primitives(first) & primitives(second)
    assert primitives(Trait.VIEW) <= primitives(Trait.MOVE) & primitives(Trait.LINEAR)
    assert primitives(Trait.PRODUCT) <= primitives(Trait.ANCHOR)
    assert primitives(Trait.BY_MASK) <= primitives(Trait.BY_RESULT)
    assert primitives(Trait.BY_FACTOR) <= primitives(Trait.ELEMENTWISE)
    assert primitives(Trait.CHECKPOINT) <= primitives(Trait.CALL)


X = jnp.arange(1.0, 13.0).reshape(3, 4)
INDEX = jnp.array([2, 0])

# Of each, a call with it on arrays that it is linear in; what has no call of its own is not among them.
LINEAR: dict[str, Callable[[Any], Any]] = {
    "add": lambda x: x + 2 * x,
    "broadcast_in_dim": lambda x: lax.broadcast_in_dim(x, (2, 3, 4), (1, 2)),
    "complex": lambda x: lax.complex(x, -x),
    "concatenate": lambda x: jnp.concatenate([x, x], 1),
    "conj": lambda x: lax.conj(lax.complex(x, x)),
    "convert_element_type": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
    "copy": lambda x: jnp.copy(x),
    "cumsum": lambda x: jnp.cumsum(x, 0),
    "device_put": lambda x: jax.device_put(x),
    "fft": lambda x: jnp.fft.fft(x),
    "imag": lambda x: jnp.imag(lax.complex(x, x)),
    "name": lambda x: checkpoint_name(x, "x"),
    "neg": lambda x: -x,
    "optimization_barrier": lambda x: lax.optimization_barrier(x),
    "pad": lambda x: jnp.pad(x, 1),
    "psum": lambda x: jax.vmap(lambda row: lax.psum(row, "rows"), axis_name="rows")(x),
    "real": lambda x: jnp.real(lax.complex(x, x)),
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 7),
    "reduce_sum": lambda x: x.sum(0),
    "reduce_window_sum": lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 2), (1, 1), "valid"),
    "reshape": lambda x: x.reshape(12),
    "rev": lambda x: lax.rev(x, (0,)),
    "sharding_constraint": lambda x: lax.with_sharding_constraint(
        x, jax.NamedSharding(jax.make_mesh((1,), ("one",)), PartitionSpec())
    ),
    "slice": lambda x: x[1:, :2],
    "split": lambda x: jnp.split(x, 2, 1)[1],
    "squeeze": lambda x: lax.squeeze(x[:1], (0,)),
    "stop_gradient": lambda x: lax.stop_gradient(x),
    "sub": lambda x: x - 3 * x,
    "tile": lambda x: lax.tile(x, (2, 1)),
    "transpose": lambda x: x.T,
    "unstack": lambda x: jnp.unstack(x)[1],
}
# Nothing public calls these outside of a manual region, a gradient or a kernel.
WITHOUT_CALL = {
    "add_any",
    "broadcast_to",
    "layout_constraint",
    "pvary",
    "relayout",
    "reshard",
    "stack",
    "with_memory_space_constraint",
}
PICKING: dict[str, Callable[[Any], Any]] = {
    "dynamic_slice": lambda x: lax.dynamic_slice(x, (INDEX[0], INDEX[1]), (1, 4)),
    "gather": lambda x: x[INDEX],
    "select_n": lambda x: jnp.where(INDEX[:1] > 1, x, 2 * x),
}
BILINEAR: dict[str, Callable[[Any, Any], Any]] = {
    "conv_general_dilated": lambda x, w: lax.conv(x[None, None], w[None, None], (1, 1), "SAME"),
    "dot_general": lambda x, w: x @ w.T,
    "mul": lambda x, w: x * w,
}


def test_every_linear_primitive_is_tried() -> None:
    assert set(LINEAR) | WITHOUT_CALL == primitives(Trait.LINEAR)
    assert set(PICKING) == primitives(Trait.PICKING)
    assert set(BILINEAR) | {"scaled_dot"} == primitives(Trait.BILINEAR)


def names_in(function: Callable[..., Any], *args: Any) -> set[str]:
    return {equation.primitive for equation in trace(function, *args).equations()}


def _is_sum_of_its_parts(function: Callable[[Any], Any]) -> None:
    other = jnp.flip(X) ** 2
    apart = jax.tree.map(jnp.add, function(X), function(other))
    np.testing.assert_allclose(np.asarray(function(X + other)), np.asarray(apart), rtol=2e-2)


def kept(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return the variables of arrays that a backward pass keeps of `function`, and those it was given."""
    program = jax.make_jaxpr(lambda *args: jax.vjp(function, *args)[1])(*args).jaxpr
    return [var for var in program.outvars if var in program.invars]


@pytest.mark.primitives
@pytest.mark.parametrize("name", sorted(LINEAR))
def test_a_linear_primitive_is_linear_and_its_gradient_reads_no_operand(name: str) -> None:
    function = LINEAR[name]
    assert name in names_in(function, X)
    _is_sum_of_its_parts(function)
    assert not kept(function, X)


@pytest.mark.primitives
@pytest.mark.parametrize("name", sorted(PICKING))
def test_what_a_picking_primitive_takes_from_is_not_read_by_its_gradient(name: str) -> None:
    assert name in names_in(PICKING[name], X)
    _is_sum_of_its_parts(PICKING[name])
    assert not kept(PICKING[name], X)


@pytest.mark.primitives
@pytest.mark.parametrize("name", sorted(BILINEAR))
def test_a_bilinear_primitive_is_linear_in_each_operand(name: str) -> None:
    function = BILINEAR[name]
    assert name in names_in(function, X, X)
    _is_sum_of_its_parts(lambda x: function(x, X))
    _is_sum_of_its_parts(lambda x: function(X, x))


@pytest.mark.primitives
@pytest.mark.parametrize("name", sorted(primitives(Trait.BY_RESULT) - primitives(Trait.BY_MASK)))
def test_a_gradient_read_off_the_result_keeps_no_operand(name: str) -> None:
    assert not kept(getattr(lax, name), X)


@pytest.mark.primitives
@pytest.mark.parametrize("name", sorted(primitives(Trait.BY_FACTOR) - {"integer_pow"}))
def test_a_gradient_by_a_factor_keeps_no_operand(name: str) -> None:
    assert not kept(getattr(lax, name), X)


@pytest.mark.primitives
def test_the_gradient_of_a_power_keeps_no_operand() -> None:
    assert not kept(lambda x: lax.integer_pow(x, 3), X)


def test_a_move_is_no_work_and_a_product_is_that_of_the_matrix_unit() -> None:
    def function(x: Any, w: Any) -> Any:
        moved = jnp.concatenate([x.T, x.T], 0)[:4].astype(jnp.bfloat16).reshape(2, 6)
        return moved.astype(jnp.float32).sum() + (x @ w).sum() + jnp.tanh(x).sum()

    for equation in trace(function, X, X.T).equations():
        unit = work(equation).unit
        if equation.primitive in primitives(Trait.MOVE):
            assert (unit, work(equation).flops) == ("move", 0)
        assert (unit == "matmul") == (equation.primitive in primitives(Trait.PRODUCT))


def test_the_name_of_a_primitive_of_a_users_own_has_no_traits() -> None:
    assert "mystery" not in traits()
