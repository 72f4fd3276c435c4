"""Layers that are written out in a Python loop are found, and run as a scan of the same values."""

from __future__ import annotations

from typing import Any

import draws
import jax
import jax.numpy as jnp
import meshwright.sharding as ms
import numpy as np
import optax
import pytest
from jax.extend import core
from meshwright.sharding.cost.tables import flatten
from meshwright.sharding.plans.specs import axes_in
from meshwright.sharding.program import trace
from meshwright.sharding.program.jaxpr import Traced, shapes_of
from meshwright.sharding.program.recognise import recognised
from meshwright.sharding.transform.pipeline.layers import layers_of

pytestmark = pytest.mark.numerics

WIDTH, HIDDEN, LAYERS = 8, 16, 4


def weights(seed: int = 0, layers: int = LAYERS) -> list[dict[str, jax.Array]]:
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * shape[0] ** -0.5, jnp.float32)

    return [{"up": array(WIDTH, HIDDEN), "down": array(HIDDEN, WIDTH)} for _ in range(layers)]


def layer(p: Any, x: Any, scale: float = 1.0) -> Any:
    return x + scale * (jnp.tanh(x @ p["up"]) @ p["down"])


def plain(params: Any, x: Any) -> Any:
    for p in params:
        x = layer(p, x)
    return jnp.mean(x**2)


def jitted_layers(params: Any, x: Any) -> Any:
    call = jax.jit(layer)
    for p in params:
        x = call(p, x)
    return jnp.mean(x**2)


def checkpointed_layers(params: Any, x: Any) -> Any:
    """Another literal inside of each checkpoint."""
    for n, p in enumerate(params):
        x = jax.checkpoint(lambda p, x, n=n: layer(p, x, 1.0 + n / 7))(p, x)
    return jnp.mean(x**2)


def in_turns(params: Any, x: Any) -> Any:
    """Two kinds of layers that differ in a number alone."""
    for n, p in enumerate(params):
        x = layer(p, x, 1.0 if n % 2 else 0.5)
    return jnp.mean(x**2)


def one_read(params: Any, x: Any) -> Any:
    """One layer's result is read by others: it goes along, and no other layer's is kept."""
    found = []
    for p in params:
        x = layer(p, x)
        found.append(x)
    return jnp.mean(x**2) + jnp.sum(jnp.sin(found[1]))


def interrupted(params: Any, x: Any) -> Any:
    """Something else is computed between two layers, out of what one gives the next."""
    more = 0.0
    for n, p in enumerate(params):
        x = layer(p, x)
        if n == 1:
            more = jnp.sum(jnp.cos(x) * p["up"][:, 0])
    return jnp.mean(x**2) + more


def backwards(params: Any, x: Any) -> Any:
    """What the first half gives, the second reads in reverse."""
    kept = []
    for p in params:
        x = layer(p, x)
        kept.append(x)
    for p in params:
        x = x + jnp.tanh((x + kept.pop()) @ p["up"] @ p["down"])
    return jnp.mean(x**2)


def in_a_checkpoint(params: Any, x: Any) -> Any:
    return jax.checkpoint(plain)(params, x)


def in_a_map(params: Any, x: Any) -> Any:
    return jnp.mean(jax.lax.map(lambda row: plain(params, row[None]), x))


def one_layer_again(params: Any, x: Any) -> Any:
    """The first layer's parameters serve all; the scale is each turn's own."""
    for n in range(LAYERS):
        x = layer(jax.tree.map(lambda w: w.astype(jnp.float32), params[0]), x, 1 / (n + 1))
    return jnp.mean(x**2)


def over_time(params: Any, x: Any) -> Any:
    """A recurrence over the columns of the data."""
    h = jnp.tile(params[1]["down"][0], (x.shape[0], 1))
    for n in range(LAYERS):
        h = layer(params[0], h + x[:, n : n + 1])
    return jnp.mean(h**2)


def cast_first(params: Any, x: Any) -> Any:
    for p in params:
        x = layer(jax.tree.map(lambda w: w.astype(jnp.bfloat16), p), x.astype(jnp.bfloat16))
    return jnp.mean(x.astype(jnp.float32) ** 2)


MODELS = [
    plain,
    jitted_layers,
    checkpointed_layers,
    in_turns,
    one_read,
    interrupted,
    backwards,
    in_a_checkpoint,
    in_a_map,
    one_layer_again,
    over_time,
    cast_first,
]


def rolled(loss: Any, params: Any, x: Any) -> tuple[Traced, Traced]:
    jaxpr, result = jax.make_jaxpr(loss, return_shape=True)(params, x)
    traced = Traced(jaxpr=jaxpr, args=shapes_of((params, x)), result=result)
    return traced, recognised(traced, ("layers",))


def scans(jaxpr: Any) -> list[Any]:
    found = []
    for eqn in jaxpr.eqns:
        found += [eqn] if eqn.primitive.name == "scan" else []
        for inner in core.jaxprs_in_params(eqn.params):
            found += scans(inner)
    return found


@pytest.mark.parametrize("loss", MODELS, ids=lambda loss: loss.__name__)
def test_layers_in_a_loop_become_a_scan_of_the_same_values(loss: Any) -> None:
    params, x = weights(), jnp.asarray(np.random.default_rng(3).normal(size=(2, WIDTH)), jnp.float32)
    _, found = rolled(loss, params, x)
    assert scans(found.jaxpr.jaxpr)
    assert not [eqn for eqn in found.jaxpr.jaxpr.eqns if eqn.primitive.name == "dot_general"]

    def again(params: Any, x: Any) -> Any:
        return core.jaxpr_as_fun(found.jaxpr)(*jax.tree.leaves((params, x)))[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(params, x)
    same, alike = jax.jit(jax.value_and_grad(again))(params, x)
    rounding = 1e-2 if loss is cast_first else 1e-5
    np.testing.assert_allclose(same, value, rtol=rounding)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rounding, atol=rounding), gradients, alike
    )


def test_what_one_layer_gives_others_is_not_kept_of_all() -> None:
    _, found = rolled(one_read, weights(), jnp.ones((2, WIDTH)))
    (scan,) = scans(found.jaxpr.jaxpr)
    assert {var.aval.shape for var in scan.outvars} == {(2, WIDTH)}


def test_parameters_are_stacked_in_the_type_that_layers_read() -> None:
    _, found = rolled(cast_first, weights(), jnp.ones((2, WIDTH)))
    (scan,) = scans(found.jaxpr.jaxpr)
    stacks = [atom.aval for atom in scan.invars if atom.aval.shape[:1] == (LAYERS,)]
    assert len(stacks) == 2
    assert {str(aval.dtype) for aval in stacks} == {"bfloat16"}


def test_parameters_that_all_layers_share_are_stacked_for_none() -> None:
    _, found = rolled(one_layer_again, weights(), jnp.ones((2, WIDTH)))
    (scan,) = scans(found.jaxpr.jaxpr)
    assert {atom.aval.shape for atom in scan.invars} <= {
        (WIDTH, HIDDEN),
        (HIDDEN, WIDTH),
        (2, WIDTH),
        (LAYERS,),
    }


def test_one_layer_called_again_keeps_what_it_hands_on_and_is_gathered_once() -> None:
    """Of 12 turns on v5e: remat is to be had, and priced; what is gathered is one layer and its gradient."""
    width, hidden, rows, turns = 512, 2048, 4096, 12

    def loss(params: Any, x: Any) -> Any:
        for _ in range(turns):
            x = layer(params, x)
        return jnp.mean(x**2)

    def shape(*sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, "float32")

    params = {"up": shape(width, hidden), "down": shape(hidden, width)}
    given = {"topology": "v5e:2x4", "mesh": {"fsdp": 8}, "microbatches": 1}
    kept, again = (
        ms.plan(loss, params, shape(rows, width), remat=remat, **given).estimate.memory
        for remat in ("none", "full")
    )
    border = rows // 8 * width * 4
    # What the loss squares is free again when the last turn is computed again.
    assert again["saved_activations"] == pytest.approx(turns * border, rel=0.01)
    assert kept["saved_activations"] > 4 * again["saved_activations"]
    assert again["communication"] == pytest.approx(2 * 2 * width * hidden * 4, rel=0.01)


def one_alone(params: Any, x: Any) -> Any:
    return jnp.mean(layer(params[0], x) ** 2)


def side_by_side(params: Any, x: Any) -> Any:
    """One layer of several inputs, whose results are added up: nothing is handed on to it."""
    return sum(jnp.mean(layer(params[0], x * n) ** 2) for n in range(LAYERS))


@pytest.mark.parametrize("loss", [one_alone, side_by_side], ids=lambda loss: loss.__name__)
def test_what_is_no_layer_is_left_as_it_is_written(loss: Any) -> None:
    traced, found = rolled(loss, weights(layers=1), jnp.ones((2, WIDTH)))
    assert found.jaxpr is traced.jaxpr


def test_the_switch_leaves_the_program_as_it_is_written() -> None:
    params, x = weights(), jnp.ones((2, WIDTH))
    assert not scans(trace(plain, params, x).jaxpr.jaxpr)
    assert scans(trace(plain, params, x, recognise=("layers",)).jaxpr.jaxpr)
    assert not scans(trace(plain, params, x, recognise=("attention", "losses")).jaxpr.jaxpr)


# A whole model: its plan is its scanned twin's, and what is trained are the user's own arrays.

VOCABULARY, ROWS, LENGTH = 64, 16, 8


def init(key: jax.Array) -> Any:
    table = draws.normal(key, (VOCABULARY, WIDTH))
    blocks = [{**block, "norm": jnp.ones(WIDTH)} for block in weights()]
    return {"embed": table, "blocks": blocks}


def block(x: Any, p: Any) -> tuple[Any, None]:
    h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["norm"]
    return layer(p, h) + x, None


def language_loss(params: Any, batch: Any, *, scanned: bool = False) -> Any:
    x = params["embed"][batch["tokens"]]
    if scanned:
        x, _ = jax.lax.scan(block, x, params["blocks"])
    else:
        for p in params["blocks"]:
            x, _ = block(x, p)
    logits = x @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def batch_of() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(5))
    names = zip(("tokens", "targets"), keys, strict=True)
    return {name: jax.random.randint(key, (ROWS, LENGTH), 0, VOCABULARY) for name, key in names}


def stacked(params: Any) -> Any:
    return {**params, "blocks": jax.tree.map(lambda *rows: jnp.stack(rows), *params["blocks"])}


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}])
def test_a_plan_of_written_out_layers_is_that_of_scanned_ones(mesh: dict[str, int]) -> None:
    params, batch = init(jax.random.key(0)), batch_of()
    plan = ms.plan(language_loss, params, batch, topology="v5e:2x4", mesh=mesh, remat="full")
    twin = ms.plan(
        lambda p, b: language_loss(p, b, scanned=True),
        stacked(params),
        batch,
        topology="v5e:2x4",
        mesh=mesh,
        remat="full",
    )
    assert plan.estimate.step_seconds < 1.1 * twin.estimate.step_seconds
    assert plan.estimate.memory["saved_activations"] == twin.estimate.memory["saved_activations"]
    # The stacks of parameters that the twin has not.
    assert plan.estimate.peak_bytes > twin.estimate.peak_bytes
    for path, row in twin.params.items():
        if path.startswith("blocks/"):
            of_one = plan.params[path.replace("blocks/", "blocks/2/")]
            assert of_one.spec == row.spec[1:], path


def test_written_out_layers_are_stored_over_stages_one_by_one() -> None:
    plan = ms.plan(language_loss, init(jax.random.key(0)), batch_of(), topology="v5e:2x4", mesh={"stage": 2})
    of_layers = [row for path, row in plan.params.items() if path.startswith("blocks/")]
    assert of_layers
    assert all("stage" in axes_in(row.spec) for row in of_layers)


def test_kept_values_are_named_without_the_layers_numbers() -> None:
    plan = ms.declare(
        language_loss,
        init(jax.random.key(0)),
        batch_of(),
        topology="cpu:8",
        mesh={"fsdp": 8},
        remat={"up": "device"},
    )
    assert plan.saved == {"up": "device"}


@pytest.mark.devices(8)
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}])
def test_written_out_layers_are_worked_through_as_planned(mesh: dict[str, int]) -> None:
    params, batch = init(jax.random.key(0)), batch_of()
    optimizer = optax.sgd(1.0)
    plan = ms.plan(
        language_loss, params, batch, topology="cpu:8", optimizer=optimizer, mesh=mesh, remat="full"
    )
    value, gradients = jax.jit(jax.value_and_grad(language_loss))(params, batch)
    state = plan.init(init, jax.random.key(0))
    assert jax.tree.structure(state["params"]) == jax.tree.structure(params)
    after, metrics = plan.train_step(language_loss, optimizer)(state, batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - g, params, gradients)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), after["params"], expected
    )


def test_notes_say_what_is_run_as_a_scan_and_what_nearly_could_be() -> None:
    _, found = rolled(plain, weights(), jnp.ones((2, WIDTH)))
    (note,) = found.notes
    assert note.startswith("layers written out one after another run as scans")
    assert "4 (" in note
    assert "test_repeats.py" in note

    def different(params: Any, x: Any) -> Any:
        """Each layer has a rule of its own for its gradient."""
        for n, p in enumerate(params):

            @jax.custom_vjp
            def touched(x: Any) -> Any:
                return jnp.sin(x)

            touched.defvjp(lambda x: (jnp.sin(x), x), lambda x, g, n=n: (g * jnp.cos(x) * (1 + n),))
            x = touched(layer(p, x))
        return jnp.mean(x**2)

    traced, found = rolled(different, weights(), jnp.ones((2, WIDTH)))
    assert found.jaxpr is traced.jaxpr
    (note,) = found.notes
    assert note.startswith("4 stretches at ")
    assert "custom_vjp_call" in note
    assert "is not the same in all of them" in note


def test_masks_that_come_again_make_one_copy_of_several_layers() -> None:
    """Every other layer hides later rows: its mask is made in it, and no array of masks is made for all."""

    def masked(params: Any, x: Any) -> Any:
        for n, p in enumerate(params):
            rows = jnp.arange(x.shape[0])
            mask = rows[:, None] >= rows if n % 2 else rows[:, None] == rows
            x = jnp.where(mask, 1.0, 0.0) @ layer(p, x)
        return jnp.mean(x**2)

    _, found = rolled(masked, weights(), jnp.ones((2, WIDTH)))
    (scan,) = scans(found.jaxpr.jaxpr)
    assert scan.params["length"] == LAYERS // 2
    assert not [atom for atom in scan.invars if str(atom.aval.dtype) == "bool"]


def test_branches_side_by_side_are_no_layers() -> None:
    def loss(params: Any, x: Any) -> Any:
        found = jax.lax.optimization_barrier([jnp.sin(x @ p["up"]) for p in params])
        return sum(jnp.mean(a * b) for a, b in zip(found, reversed(found), strict=True))

    traced, found = rolled(loss, weights(layers=8), jnp.ones((2, WIDTH)))
    assert found.jaxpr is traced.jaxpr


def test_stages_cut_the_stack_beside_one_layer_that_does_more() -> None:
    def loss(params: Any, x: Any) -> Any:
        x, _ = jax.lax.scan(lambda x, p: (layer(p, x), None), x, params["stack"])
        for _ in range(6):
            x = layer(params["again"], x)
        return jnp.mean(x**2)

    stack = jax.tree.map(lambda *blocks: jnp.stack(blocks), *weights())
    again = {"up": jnp.ones((WIDTH, 1024)), "down": jnp.ones((1024, WIDTH))}
    program = trace(loss, {"stack": stack, "again": again}, jnp.ones((2, WIDTH)), recognise=("layers",))
    assert layers_of(program, 4).eqn.params["length"] == LAYERS
    assert flatten(program).layers == LAYERS
