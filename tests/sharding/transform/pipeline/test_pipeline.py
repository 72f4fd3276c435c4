"""Stages over the layers of a loss: its value, aux and gradients, what a tick sends, and what is refused."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import draws
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.runtime.checkpoint import Checkpoints
from meshwright.sharding import Plan, UserError, declare
from meshwright.sharding.hlo.loops import loops, run_counts
from meshwright.sharding.hlo.text import parse_hlo
from meshwright.sharding.transform.pipeline.schedule import BACKWARD, FORWARD, WEIGHTS, work_of

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

LAYERS, WIDTH, HIDDEN, VOCAB, ROWS, TIME = 4, 16, 32, 32, 32, 8


NAMES = {
    "blocks": {
        "up": ("layers", "embed", "mlp"),
        "down": ("layers", "mlp", "embed"),
        "scale": ("layers", "embed"),
    },
    "first": (None, "embed", None),
    "gate": ("embed",),
    "table": ("vocab", "embed"),
}


def init(dtype: Any = jnp.float32) -> Any:
    keys = jax.random.split(jax.random.key(0), 4)

    def normal(key: Any, *shape: int) -> Any:
        return (draws.normal(key, shape) * 0.2).astype(dtype)

    return {
        "blocks": {
            "up": normal(keys[0], LAYERS, WIDTH, HIDDEN),
            "down": normal(keys[1], LAYERS, HIDDEN, WIDTH),
            "scale": jnp.ones((LAYERS, WIDTH), dtype),
        },
        "first": normal(keys[2], 2, WIDTH, WIDTH),
        "gate": jnp.full((WIDTH,), 0.1, dtype),
        "table": normal(keys[3], VOCAB, WIDTH),
    }


def batch(rows: int = ROWS) -> Any:
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, rows, TIME)).astype(np.int32)
    counted = (np.arange(TIME) < np.arange(rows)[:, None] % 8).astype(np.float32)
    return {"tokens": ids[0], "targets": ids[1], "counted": counted}


def blocks(params: Any, x: Any, streamed: bool = False) -> Any:
    begun, windows = x, jnp.arange(LAYERS) % 2

    def block(carry: tuple[Any, Any], layer: Any) -> Any:
        x, number = carry
        weights, window = layer
        h = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * weights["scale"]
        h = jnp.where(window == 0, h, jnp.roll(h, 1, axis=1)) + params["gate"] * (begun if streamed else 1)
        return (x + jnp.tanh(h @ weights["up"]) @ weights["down"] / (1 + number), number + 1), None

    return jax.lax.scan(block, (x, jnp.zeros((), x.dtype)), (params["blocks"], windows))[0][0]


def tied(params: Any, batch: Any) -> Any:
    """A tied table, two layers before, one kind of layers with constants, a counter and flags."""
    x, _ = jax.lax.scan(
        lambda x, w: (x + jnp.tanh(x @ w), None), params["table"][batch["tokens"]], params["first"]
    )
    logits = blocks(params, x, streamed=True) @ params["table"].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    counted = batch["counted"].astype(losses.dtype)
    decay = 1e-3 * jnp.square(params["blocks"]["up"]).sum()
    aux = {"largest": losses.max(), "each": losses.sum(axis=1)}
    return (losses * counted).sum() / counted.sum() + decay, aux


def drawn(params: Any, batch: Any) -> Any:
    """Noise of the whole batch's shape, and a mean."""
    x = params["table"][batch["tokens"]]
    x = blocks(params, x + 0.1 * jax.random.normal(jax.random.key(1), x.shape).astype(x.dtype))
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ params["table"].T, batch["targets"])
    return losses.mean()


def written_out(params: Any, batch: Any) -> Any:
    """Layers in a Python loop, whose arrays are a dictionary each, one of them shared by all."""
    x = params["table"][batch["tokens"]]
    for layer in params["blocks"]:
        h = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * layer["scale"]
        x = x + jnp.tanh((h + params["gate"]) @ layer["up"]) @ layer["down"]
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ params["table"].T, batch["targets"])
    return losses.mean() + 1e-3 * sum(jnp.square(layer["up"]).sum() for layer in params["blocks"])


def apart_by_layer(params: Any) -> Any:
    blocks = [jax.tree.map(lambda leaf, n=n: leaf[n], params["blocks"]) for n in range(LAYERS)]
    return {"blocks": blocks, "gate": params["gate"], "table": params["table"]}


def mixture(params: Any, batch: Any) -> Any:
    """Layers, from the last on, that give sums over the batch, products of these, and values of each row."""

    def block(carry: Any, layer: Any) -> Any:
        x, total, number = carry
        shares = jax.nn.softmax(x @ layer["up"][:, :4])
        busy = jax.nn.one_hot(shares.argmax(-1), 4).mean((0, 1))
        total += (busy * shares.mean((0, 1))).sum() * (1 + number)
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
        return (x, total, number + 1), (jnp.square(shares).mean((0, 1)), x[:, 0], busy)

    start = params["table"][batch["tokens"]], 0.0, 0
    (x, total, number), (squares, first, busy) = jax.lax.scan(block, start, params["blocks"], reverse=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ params["table"].T, batch["targets"])
    loss = losses.mean() + 0.1 * total / number + squares[:, 0].sum() + jnp.square(first).mean()
    return loss, {"busy": busy, "first": first}


def declared(loss: Callable[..., Any], mesh: dict[str, int], microbatches: int = 4, **how: Any) -> Plan:
    size = int(np.prod(list(mesh.values())))
    shapes = jax.eval_shape(lambda: init(how.pop("dtype", jnp.float32)))
    rows = batch(how.pop("rows", ROWS))
    how = {"topology": f"cpu:{size}", "mesh": mesh, "names": NAMES, "microbatches": microbatches} | how
    return declare(loss, shapes, rows, **how)


def gradients(plan: Plan, loss: Callable[..., Any], params: Any, rows: int = ROWS) -> Any:
    mesh = plan.make_mesh(devices=jax.devices()[: plan.topology.num_devices])
    placed = plan.shardings(params, mesh), plan.shardings(batch(rows), mesh, "batch")
    has_aux = isinstance(jax.eval_shape(loss, params, batch(rows)), tuple)
    function = jax.jit(jax.value_and_grad(plan.apply(loss, mesh=mesh), has_aux=has_aux))
    args = jax.device_put((params, batch(rows)), placed)
    program = function.lower(*args).compile()
    return program, jax.device_get(program(*args)), jax.jit(jax.value_and_grad(loss, has_aux=has_aux))


def apart(found: Any, wanted: Any) -> list[float]:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    wide = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return [float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0)) for a, b in wide]


def sends(text: str) -> float:
    """Return how often a step sends from stage to stage."""
    module = parse_hlo(text)
    runs = run_counts(module, loops(module), lambda conditional: "")
    permutes = [one for one in module.instructions.values() if one.opcode.startswith("collective-permute")]
    return sum(runs[one.computation] for one in permutes if not one.opcode.endswith("done"))


AS_COMPILED = pytest.mark.numerics(False)


@pytest.mark.parametrize(
    ("mesh", "loss", "how"),
    [
        pytest.param({"stage": 4, "data": 2}, tied, {}, marks=[pytest.mark.slow, AS_COMPILED]),
        pytest.param(
            {"stage": 2, "fsdp": 2, "tensor": 2},
            tied,
            {"remat": "full"},
            marks=[pytest.mark.slow, AS_COMPILED],
        ),
        pytest.param({"stage": 2}, tied, {}, marks=AS_COMPILED),
        pytest.param({"stage": 2}, mixture, {}, marks=pytest.mark.slow),
    ],
    ids=lambda one: getattr(one, "__name__", str(one)),
)
def test_stages_give_the_plain_functions_gradients(mesh: dict[str, int], loss: Any, how: Any) -> None:
    program, found, plain = gradients(declared(loss, mesh, **how), loss, init())
    assert max(apart(found, plain(init(), batch()))) < 1e-6
    if loss is mixture:
        return
    # M + p - 1 ticks forward and as many backward, with two things that travel: the carry, and a constant.
    assert sends(program.as_text()) <= 2 * 3 * (4 + mesh["stage"] - 1)


@pytest.mark.once("sharding/transform/pipeline/test_pipeline.py")
@pytest.mark.parametrize(
    ("mesh", "loss", "rows", "how"),
    [
        # Of each microbatch a device has 2 rows, 3 and 1, which 2, 1 and 1 of the stages share out.
        ({"stage": 4, "data": 2}, mixture, 16, {}),
        pytest.param({"stage": 4}, tied, 12, {"schedule": "delayed"}, marks=pytest.mark.slow),
        pytest.param({"stage": 4}, drawn, 4, {}, marks=pytest.mark.slow),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_fewer_stages_share_out_the_rows_of_a_microbatch(mesh: Any, loss: Any, rows: int, how: Any) -> None:
    _, found, plain = gradients(declared(loss, mesh, rows=rows, **how), loss, init(), rows)
    assert max(apart(found, plain(init(), batch(rows)))) < 1e-6


@pytest.mark.parametrize(
    ("layers", "mesh", "loss", "how"),
    [
        (4, {"stage": 2, "fsdp": 2, "tensor": 2}, tied, {"remat": "full"}),
        pytest.param(4, {"stage": 4, "data": 2}, mixture, {"microbatches": 2}, marks=pytest.mark.slow),
        # Three layers and a copy in four chunks, one at a time; a group of microbatches is not full.
        pytest.param(3, {"stage": 2}, tied, {"interleave": 2, "microbatches": 1}, marks=pytest.mark.slow),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_delayed_gradients_of_weights_are_the_plain_functions(
    layers: int, mesh: dict[str, int], loss: Any, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "LAYERS", layers)
    plan = declared(loss, mesh, **how, schedule="delayed")
    program, found, plain = gradients(plan, loss, init())
    assert max(apart(found, plain(init(), batch()))) < 1e-6
    assert {FORWARD, BACKWARD, WEIGHTS} <= set(map(work_of, program.as_text().splitlines()))


def products(jaxpr: Any) -> int:
    """Return how many products a device executes."""
    found = 0
    for eqn in jaxpr.eqns:
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        found += eqn.primitive.name == "dot_general"
        found += times * sum(map(products, jax.extend.core.jaxprs_in_params(eqn.params)))
    return found


@pytest.mark.once("sharding/transform/pipeline/test_pipeline.py")
@pytest.mark.parametrize(
    ("mesh", "loss", "how"),
    [
        ({"stage": 4, "data": 2}, drawn, {"schedule": "delayed"}),
        pytest.param({"stage": 2, "fsdp": 2, "tensor": 2}, tied, {"interleave": 2}, marks=pytest.mark.slow),
        pytest.param({"stage": 2}, mixture, {"remat": "full"}, marks=pytest.mark.slow),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_layers_keep_goes_over_ticks(mesh: dict[str, int], loss: Any, how: Any) -> None:
    how = {"remat": "dots"} | how
    kept, again = (declared(loss, mesh, **how, stage_remat=one) for one in (False, True))
    _, found, plain = gradients(kept, loss, init())
    assert max(apart(found, plain(init(), batch()))) < 1e-6
    made = []
    for plan in (kept, again):
        whole = plan.make_mesh(devices=jax.devices()[: plan.topology.num_devices])
        has_aux = isinstance(jax.eval_shape(loss, init(), batch()), tuple)
        slope = jax.grad(plan.apply(loss, mesh=whole), has_aux=has_aux)
        made.append(products(jax.make_jaxpr(slope)(init(), batch()).jaxpr))
    # The products of each layer, in each tick that goes back: v M + p - 1.
    stages, chunks, each = mesh["stage"], kept.interleave, 3 if loss is mixture else 2
    ticks = chunks * kept.microbatches + stages - 1
    assert made[1] - made[0] == each * ticks * LAYERS // (stages * chunks)


@pytest.mark.once("sharding/transform/pipeline/test_pipeline.py")
def test_uneven_chunks_of_too_few_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three layers and a copy of the last one in four chunks; one of a group of two microbatches is none.
    monkeypatch.setattr(sys.modules[__name__], "LAYERS", 3)
    # Some of the layers' parameters are frozen.
    learn = ["blocks/up", "blocks/scale", "first", "gate", "table"]
    plan = declared(tied, {"stage": 2, "data": 2}, 1, interleave=2, remat="full", trainable=learn)
    assert plan.interleave == 2
    assert plan.params["blocks/up"].spec == (None, None, "stage")
    state = plan.init(lambda key: init(), jax.random.key(0), optax.sgd(0.1))
    state, metrics = plan.train_step(tied, optax.sgd(0.1))(state, batch())
    (value, _), slope = jax.jit(jax.value_and_grad(tied, has_aux=True))(init(), batch())
    slope["blocks"]["down"] *= 0
    after = jax.tree.map(lambda old, change: old - 0.1 * change, init(), slope)
    assert max(apart([metrics["loss"], state["params"]], [value, after])) < 1e-6


@pytest.mark.once("sharding/program/test_repeats.py")
def test_layers_in_a_python_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    # Five in four chunks; some parameters are stored over fsdp and tensor in one dimension.
    monkeypatch.setattr(sys.modules[__name__], "LAYERS", 5)
    params = apart_by_layer(init())
    how = {"mesh": {"stage": 2, "fsdp": 2, "tensor": 2}, "microbatches": 4, "interleave": 2}
    plan = declare(written_out, params, batch(), topology="cpu:8", **how)
    _, found, plain = gradients(plan, written_out, params)
    assert max(apart(found, plain(params, batch()))) < 1e-6


def skips(params: Any, batch: Any) -> Any:
    """Layers in a Python loop, each of which reads what one of the layers before it has given."""
    x, given = params["table"][batch["tokens"]], []
    for layer in params["down"]:
        x = x + jnp.tanh(x @ layer)
        given.append(x)
    for layer in params["up"]:
        x = x + jnp.tanh(jnp.concatenate([x, given.pop()], -1) @ layer)
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["table"].T, batch["targets"]).mean()


def apart_by_skips(params: Any) -> Any:
    up, down = params["blocks"]["up"], params["blocks"]["down"]
    return {"table": params["table"], "up": [*down], "down": [*up[:, :, :WIDTH]]}


@pytest.mark.once("sharding/transform/pipeline/test_pipeline.py")
@pytest.mark.parametrize(
    ("loss", "params", "how"),
    [
        (drawn, init, {"rules": {"*gate": ["stage"]}}),
        pytest.param(skips, lambda: apart_by_skips(init()), {}, marks=pytest.mark.slow),
    ],
    ids=["by a rule", "of other layers"],
)
def test_what_layers_read_besides_may_be_stored_over_stages(loss: Any, params: Any, how: Any) -> None:
    plan = declare(loss, params(), batch(), topology="cpu:2", mesh={"stage": 2}, microbatches=2, **how)
    assert sum("stage" in one.spec and len(one.shape) < 3 for one in plan.params.values())
    _, found, plain = gradients(plan, loss, params())
    assert max(apart(found, plain(params(), batch()))) < 1e-6


@pytest.mark.slow
def test_half_precision_is_as_near_as_the_plain_function() -> None:
    half = init(jnp.bfloat16)
    plan = declared(drawn, {"stage": 2, "data": 2, "tensor": 2}, dtype=jnp.bfloat16)
    _, found, plain = gradients(plan, drawn, half)
    exact = jax.jit(jax.grad(drawn))(jax.tree.map(jnp.float32, half), batch())
    for ours, own in zip(apart(found[1], exact), apart(plain(half, batch())[1], exact), strict=True):
        assert ours <= 2 * own


def restored(folder: pathlib.Path, state: Any, plan: Plan) -> Any:
    """Save a state and return what comes back, laid out as another plan says."""
    mesh = plan.make_mesh(devices=jax.devices()[: plan.topology.num_devices])
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state, metadata={})
    wanted = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        state,
        plan.shardings(state, mesh),
    )
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(wanted)
    assert found is not None
    return found.state


@pytest.mark.once("sharding/transform/test_step.py")
def test_a_step_an_evaluation_and_checkpoints_of_a_jitted_loss(tmp_path: pathlib.Path) -> None:
    loss = jax.jit(drawn)
    plan = declared(loss, {"stage": 2, "data": 2, "fsdp": 2})
    state = plan.init(lambda key: init(), jax.random.key(0), optax.sgd(0.1))
    state, metrics = plan.train_step(loss, optax.sgd(0.1))(state, batch())
    value, slope = jax.jit(jax.value_and_grad(drawn))(init(), batch())
    after = jax.tree.map(lambda old, change: old - 0.1 * change, init(), slope)
    assert apart(metrics["loss"], value)[0] < 1e-6
    assert max(apart(state["params"], after)) < 1e-6
    value = jax.jit(plan.apply(drawn))(state["params"], batch())
    assert apart(value, drawn(after, batch()))[0] < 1e-6
    # To layers that no stage stores where it runs them, to no stages at all, and back.
    ways: list[Any] = [({"stage": 2, "data": 2}, {"interleave": 2}), ({"fsdp": 2, "tensor": 4}, {})]
    others = [declared(drawn, mesh, **how) for mesh, how in ways]
    last = state
    for number, other in enumerate((*others, plan)):
        last = restored(tmp_path / str(number), last, other)
        same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), last, state)
        assert all(jax.tree.leaves(same))


def test_gradients_of_a_tick_are_taken_once_for_all_loops_of_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks a stage have more loops than one, of the same layers, head and embedding."""
    vjp, taken = jax.vjp, []
    monkeypatch.setattr(jax, "vjp", lambda *args, **more: taken.append(args[0]) or vjp(*args, **more))
    params, data, counts = init(), batch(), []
    for chunks in (1, 2):
        plan = declared(tied, {"stage": 2, "data": 2}, 8, interleave=chunks, remat="full")
        taken.clear()
        jax.jit(jax.value_and_grad(plan.apply(tied), has_aux=True)).trace(params, data)
        counts.append(len(taken))
    assert counts == [3, 3]


@pytest.mark.slow
@pytest.mark.numerics(False)
def test_memory_does_not_grow_with_microbatches() -> None:
    # Of a loss without draws: those have the whole batch's shape, and are made before the loop.
    held = []
    for count in (8, 32):
        plan = declared(tied, {"stage": 4}, microbatches=count, rows=count * 8, remat="full")
        mesh = plan.make_mesh(devices=jax.devices()[:4])
        function = jax.jit(jax.grad(plan.apply(tied, mesh=mesh), has_aux=True))
        rows = batch(count * 8)
        placed = jax.device_put(
            (init(), rows), (plan.shardings(init(), mesh), plan.shardings(rows, mesh, "batch"))
        )
        held.append(function.lower(*placed).compile().memory_analysis().temp_size_in_bytes)
    assert held[1] <= 1.05 * held[0]


def statistics(params: Any, batch: Any) -> Any:
    x = blocks(params, params["table"][batch["tokens"]])
    return jnp.square((x - x.mean()) / jnp.sqrt(x.var() + 1e-3)).mean() + jnp.tanh(x).sum()


def again(params: Any, batch: Any) -> Any:
    first = blocks(params, params["table"][batch["tokens"]])
    return blocks(params, params["table"][batch["targets"]] + first, streamed=True).mean()


def looped(params: Any, batch: Any) -> Any:
    return blocks(params, blocks(params, params["table"][batch["tokens"]])).mean()


def until(params: Any, batch: Any) -> Any:
    up, down = params["blocks"]["up"], params["blocks"]["down"]

    def layer(carry: tuple[Any, Any]) -> tuple[Any, Any]:
        x, number = carry
        return x + jnp.tanh(x @ up[number]) @ down[number], number + 1

    return jax.lax.while_loop(lambda c: c[1] < LAYERS, layer, (params["table"][batch["tokens"]], 0))[0].mean()


def in_two_types(params: Any, batch: Any) -> Any:
    x = params["table"][batch["tokens"]]
    half, small = jax.tree.map(lambda one: one.astype(jnp.bfloat16), (params, x))
    return blocks(params, x).mean() + blocks(half, small).astype(jnp.float32).mean()


def shared(params: Any, batch: Any) -> Any:
    """One layer's parameters for all turns."""
    own = params["first"][0]
    x = params["table"][batch["tokens"]]
    return jax.lax.scan(lambda x, _: (x + jnp.tanh(x @ own), None), x, None, length=4)[0].mean()


@pytest.mark.parametrize(
    ("loss", "how", "says"),
    [
        (in_two_types, {}, "they run 2 times, in float32 and bfloat16: nearest is one type for all of them"),
        (shared, {}, r"at .*\(shared\).* have no parameters of their own: .* nearest is no stage"),
        (looped, {}, "those inside of scan at .* run again in each of its turns: nearest is no stage"),
        (until, {}, r"the loop at .*\(until\) runs is not known; .* or jax.lax.fori_loop with numbers"),
        (again, {}, "they run 2 times, each on what the run before gives: nearest is no stage"),
        (statistics, {"max_passes": 9}, "passes over the batch"),
        (drawn, {"accumulation": "by part"}, "sums microbatches exactly"),
        (drawn, {"stage_remat": False}, "nearest: remat='dots', 'full', or names"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_stages_cannot_do_is_one_sentence(loss: Any, how: Any, says: str) -> None:
    def run() -> None:
        plan = declared(loss, {"stage": 2}, **how)
        mesh = plan.make_mesh(devices=jax.devices()[:2])
        jax.eval_shape(jax.grad(plan.apply(loss, mesh=mesh)), init(), batch())

    with pytest.raises(UserError, match=says):
        run()
