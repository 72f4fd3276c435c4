"""Rows worked through by hand: the whole batch's gradients, reduced outside of the loop over microbatches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core
from meshwright.sharding import declare
from meshwright.sharding.hlo.loops import loops, run_counts
from meshwright.sharding.hlo.replica_groups import axes_of_groups
from meshwright.sharding.hlo.text import parse_hlo

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

LAYERS, WIDTH, HIDDEN, VOCAB, ROWS, TIME = 3, 16, 32, 32, 32, 8
NAMES = {
    "table": ("vocab", "embed"),
    "layers": {
        "up": ("layers", "embed", "mlp"),
        "down": ("layers", "mlp", "embed"),
        "scale": ("layers", "embed"),
    },
    "head": ("embed", "vocab"),
}


def init(dtype: Any = jnp.float32) -> Any:
    keys = jax.random.split(jax.random.key(0), 4)

    def normal(key: Any, *shape: int) -> Any:
        return (draws.normal(key, shape) * 0.2).astype(dtype)

    return {
        "table": normal(keys[0], VOCAB, WIDTH),
        "layers": {
            "up": normal(keys[1], LAYERS, WIDTH, HIDDEN),
            "down": normal(keys[2], LAYERS, HIDDEN, WIDTH),
            "scale": jnp.ones((LAYERS, WIDTH), dtype),
        },
        "head": normal(keys[3], WIDTH, VOCAB),
    }


def batch() -> Any:
    numbers = np.random.default_rng(0)
    ids = numbers.integers(0, VOCAB, (2, ROWS, TIME)).astype(np.int32)
    return {
        "tokens": ids[0],
        "targets": ids[1],
        "counts": (np.arange(TIME) < np.arange(ROWS)[:, None] % 8) * 1.0,
    }


def each(params: Any, batch: Any) -> Any:
    def layer(x: Any, weights: Any) -> Any:
        h = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * weights["scale"]
        return x + jnp.tanh(h @ weights["up"]) @ weights["down"], None

    x, _ = jax.lax.scan(layer, params["table"][batch["tokens"]], params["layers"])
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["head"], batch["targets"])


def masked(params: Any, batch: Any) -> Any:
    losses = each(params, batch)
    counts = batch["counts"].astype(losses.dtype)
    return (losses * counts).sum() / counts.sum(), {"largest": losses.max(), "each": losses.sum(axis=1)}


def flooded(params: Any, batch: Any) -> Any:
    return jnp.abs(each(params, batch).mean() - 0.5) + 0.5


def normalised(params: Any, batch: Any) -> Any:
    """Statistics over the whole batch, which take passes of their own."""
    losses = each(params, batch)
    noise = jax.random.normal(jax.random.key(1), losses.shape)
    return jnp.tanh((losses - losses.mean()) / jnp.sqrt(losses.var() + 0.1) + 1.0 + 0.1 * noise).mean()


def planned(
    loss: Any, mesh: dict[str, int], dtype: Any = jnp.float32, microbatches: int = 4, **how: Any
) -> Any:
    return declare(
        loss, init(dtype), batch(), topology="cpu:8", mesh=mesh, names=NAMES, microbatches=microbatches, **how
    )


def compiled(plan: Any, loss: Any, params: Any) -> tuple[Any, Any, Any]:
    mesh = plan.make_mesh()
    where = plan.shardings(params, mesh), plan.shardings(batch(), mesh, "batch")
    args = jax.device_put((params, batch()), where)
    takes_aux = isinstance(jax.eval_shape(loss, params, batch()), tuple)
    function = jax.jit(jax.value_and_grad(plan.apply(loss, mesh=mesh), has_aux=takes_aux))
    program = function.lower(*args).compile()
    return program, program(*args), jax.jit(jax.value_and_grad(loss, has_aux=takes_aux))


def reductions(text: str, mesh: dict[str, int]) -> dict[str, Counter[str]]:
    """Return how often a step sums over each mesh axis, in loops and outside of them."""
    module = parse_hlo(text)
    runs = run_counts(module, loops(module), lambda conditional: "")
    found: dict[str, Counter[str]] = {"inside": Counter(), "outside": Counter()}
    for one in module.instructions.values():
        if (
            one.opcode.removesuffix("-start") not in ("all-reduce", "reduce-scatter")
            or one.collective is None
        ):
            continue
        where = "outside" if one.computation == module.entry else "inside"
        for axis in axes_of_groups(one.collective.groups, mesh).names:
            found[where][axis] += int(runs[one.computation])
    return found


def close(found: Any, wanted: Any, bound: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


MESHES = [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.mark.numerics(False)
@pytest.mark.parametrize("mesh", [pytest.param(MESHES[0], marks=pytest.mark.slow), MESHES[1]], ids=str)
def test_data_is_reduced_once_a_step_and_outside_of_loops(mesh: dict[str, int]) -> None:
    program, found, plain = compiled(planned(masked, mesh, remat="full"), masked, init())
    close(found, plain(init(), batch()), 1e-6)
    counted = reductions(program.as_text(), mesh)
    assert counted["inside"]["data"] == 0
    assert counted["outside"]["data"] > 0
    # Scattered where parameters are stored so: each layer's three in every microbatch, table and head.
    scattered = 4 * (3 * LAYERS + 2) if "fsdp" in mesh else 0
    assert counted["inside"]["fsdp"] == scattered


@pytest.mark.slow
@pytest.mark.numerics(False)
def test_statistics_of_the_whole_batch() -> None:
    with jax.enable_x64(True):
        plan = planned(normalised, MESHES[1], jnp.float64, microbatches=2, max_passes=6)
        program, found, plain = compiled(plan, normalised, init(jnp.float64))
        close(found, plain(init(jnp.float64), batch()), 1e-12)
    assert reductions(program.as_text(), MESHES[1])["inside"]["data"] == 0


def test_a_function_of_one_sum() -> None:
    mesh = {"data": 2, "fsdp": 4}
    _, found, plain = compiled(planned(flooded, mesh), flooded, init())
    close(found, plain(init(), batch()), 1e-6)


@pytest.mark.once("sharding/transform/accumulation/test_region.py")
def test_half_precision_is_as_near_as_the_plain_function() -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), init())
    _, found, plain = compiled(planned(masked, MESHES[1], jnp.bfloat16), masked, half)
    exact = jax.jit(jax.value_and_grad(masked, has_aux=True))(jax.tree.map(jnp.float32, half), batch())
    own = plain(half, batch())
    for a, b, c in zip(*map(jax.tree.leaves, (found[1], own[1], exact[1])), strict=True):
        a, b, c = (np.asarray(one, np.float64) for one in (a, b, c))
        assert np.linalg.norm(a - c) <= 2 * np.linalg.norm(b - c)


@jax.tree_util.register_pytree_node_class
class Arrays:
    """A tree of a user's own that is made of arrays only, as modules of libraries are."""

    def __init__(self, **arrays: Any) -> None:
        assert all(hasattr(one, "shape") and hasattr(one, "dtype") for one in arrays.values())
        self.arrays = arrays

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        return tuple(self.arrays.values()), tuple(self.arrays)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], leaves: Any) -> Arrays:
        made = object.__new__(cls)
        made.arrays = dict(zip(names, leaves, strict=True))
        assert not any("Primal" in type(one).__name__ for one in leaves)
        return made


def named_axis_and_whole_slices(params: Any, x: Any) -> Any:
    """A mean and a maximum by `vmap`'s named axis; additions to all of an array, whose indices are none."""

    def one(row: Any) -> Any:
        away = (row - jax.lax.pmean(row, "rows")) / (1 + jax.lax.pmax(jnp.abs(row), "rows"))
        return jnp.tanh(away @ params.arrays["up"])

    h = jax.vmap(one, axis_name="rows")(x)
    h = h.at[:, : h.shape[1]].add(params.arrays["bias"])
    return jnp.square(jax.lax.map(lambda row: row.at[: row.size].multiply(row), h)).sum()


def test_a_tree_of_ones_own_a_named_axis_and_no_array_without_elements_into_the_region() -> None:
    params, x = (
        Arrays(up=init()["head"], bias=jnp.linspace(0, 1, VOCAB)),
        batch()["counts"] @ init()["table"][:TIME],
    )
    plan = declare(named_axis_and_whole_slices, params, x, topology="cpu:8", mesh={"data": 8}, microbatches=2)
    function = jax.value_and_grad(plan.apply(named_axis_and_whole_slices))
    close(jax.jit(function)(params, x), jax.value_and_grad(named_axis_and_whole_slices)(params, x), 1e-5)
    regions = [
        eqn
        for eqn in equations(jax.make_jaxpr(function)(params, x).jaxpr)
        if "shard_map" in str(eqn.primitive)
    ]
    assert regions
    assert all(atom.aval.size for eqn in regions for atom in eqn.invars)


def equations(jaxpr: Any) -> Any:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from equations(inner)
