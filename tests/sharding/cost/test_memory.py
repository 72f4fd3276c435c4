"""Bytes at the fullest moment of a step, of programs with several scans over layers."""

from __future__ import annotations

from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import Topology, plan
from meshwright.sharding.cost import Calibration, Candidate, Pricer, memory
from meshwright.sharding.program import trace

WIDTH, HIDDEN, ROWS, ENCODER, DECODER = 32, 256, 1024, 4, 7
STREAM = ROWS // 8 * WIDTH * 4


def layer(p: Any, x: Any, memory: Any = None) -> Any:
    inside = x @ p["up"]
    if memory is not None:
        inside += memory @ p["cross"]
    return x + jnp.tanh(inside) @ p["down"]


def loss(params: Any, batch: Any) -> Any:
    x, y = batch["source"], batch["target"]
    for p in params["encoder"]:
        x = layer(p, x)
    for p in params["decoder"]:
        y = layer(p, y, x)
    return jnp.square(y).mean()


def scanned(params: Any, batch: Any) -> Any:
    x = jax.lax.scan(lambda x, p: (layer(p, x), None), batch["source"], params["encoder"])[0]
    y = jax.lax.scan(lambda y, p: (layer(p, y, x), None), batch["target"], params["decoder"])[0]
    return jnp.square(y).mean()


def arrays(count: int, *, cross: bool) -> list[Any]:
    def one(number: int) -> dict[str, Any]:
        keys = jax.random.split(jax.random.key(number), 3)
        shapes = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH), "cross": (WIDTH, HIDDEN)}
        if not cross:
            del shapes["cross"]
        return {
            name: 0.1 * draws.normal(key, shape)
            for key, (name, shape) in zip(keys, shapes.items(), strict=False)
        }

    return [one(count * cross + number) for number in range(count)]


def made_params() -> Any:
    return {"encoder": arrays(ENCODER, cross=False), "decoder": arrays(DECODER, cross=True)}


def made_batch() -> Any:
    keys = jax.random.split(jax.random.key(7))
    names = ("source", "target")
    return {name: draws.normal(key, (ROWS, WIDTH)) for name, key in zip(names, keys, strict=True)}


def planned(loss: Any, params: Any, batch: Any, remat: str) -> Any:
    return plan(loss, params, batch, topology="cpu:8", mesh={"data": 8}, remat=remat, microbatches=1)


@pytest.mark.parametrize("written", ["in loops", "scanned"])
def test_every_stack_keeps_its_layers_inputs_alone_under_remat(written: str) -> None:
    params, batch = made_params(), made_batch()
    if written == "scanned":
        params = {name: jax.tree.map(lambda *one: jnp.stack(one), *each) for name, each in params.items()}
    function = loss if written == "in loops" else scanned
    kept = {
        remat: planned(function, params, batch, remat).estimate.memory["saved_activations"]
        for remat in ("none", "full")
    }
    inputs = (ENCODER + DECODER) * STREAM
    # Besides what layers are handed: what the encoder gives, and what the loss is of.
    assert inputs <= kept["full"] <= inputs + 3 * STREAM
    assert kept["none"] > inputs + (ENCODER + DECODER) * STREAM * HIDDEN / WIDTH


@pytest.mark.numerics
@pytest.mark.devices(8)
def test_both_stacks_run_under_remat_on_eight_devices() -> None:
    params, batch = made_params(), made_batch()
    made = planned(loss, params, batch, "full")
    with jax.default_matmul_precision("highest"):
        applied = jax.value_and_grad(made.apply(loss, mesh=made.make_mesh()))
        text = str(jax.make_jaxpr(applied)(params, batch))
        got = jax.jit(applied)(params, batch)
        expected = jax.jit(jax.value_and_grad(loss))(params, batch)
    assert text.count("remat2[") + text.count("checkpoint[") >= 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)


DEPTH, EMBED, INNER, IDS = 4, 64, 256, 4096
MATRICES = DEPTH * 2 * EMBED * INNER


def read(params: Any, ids: Any, targets: Any, kind: str) -> Any:
    """Return the loss of a table, layers that cast their matrices to `kind`, and a wide product."""

    def body(x: Any, p: Any) -> tuple[Any, None]:
        return x + jnp.tanh(x @ p["up"].astype(kind)) @ p["down"].astype(kind), None

    x = jax.lax.scan(body, params["table"].astype(kind)[ids], params["layers"])[0]
    logits = (x @ params["head"].astype(kind)).astype("float32")
    picked = jnp.take_along_axis(logits, targets[:, None], -1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)


def moments_of(
    kind: str,
    remat: str,
    cut: tuple[str, ...] = (),
    microbatches: int = 1,
    topology: str = "v5p:2x2x2",
) -> list[dict[str, float]]:
    """Return moments of data parallelism over eight devices, from the loss back, with what is `cut`."""
    shape = jax.ShapeDtypeStruct
    params = {
        "head": shape((EMBED, IDS), "float32"),
        "layers": {
            "down": shape((DEPTH, INNER, EMBED), "float32"),
            "up": shape((DEPTH, EMBED, INNER), "float32"),
        },
        "table": shape((IDS, EMBED), "float32"),
    }
    batch = {name: shape((64,), "int32") for name in ("ids", "targets")}
    program = trace(lambda p, b: read(p, b["ids"], b["targets"], kind), params, batch)
    pricer = Pricer(program, Topology.parse(topology), optimizer_slots=8.0, calibration=Calibration())
    in_parts = {0: ((), ("data",)), 1: ((), (), ("data",)), 2: ((), (), ("data",)), 3: ((), ("data",))}
    candidate = Candidate(
        mesh={"data": 8},
        dims={program.batch_dims[0]: ("data",)},
        remat=remat,
        microbatches=microbatches,
        **dict.fromkeys(cut, in_parts),
    )
    placement = pricer.place(candidate)
    over = pricer.stored_over(candidate, placement)
    standing = memory.standing(pricer.profile, placement, candidate, over, 8.0, None, 1)
    work, kept = pricer.worked(placement, candidate.mesh), pricer.kept(candidate)
    return list(memory.moments(pricer.profile, candidate, standing, work, kept, False))


@pytest.mark.parametrize(
    ("kind", "remat", "cut", "topology", "size"),
    [
        ("bfloat16", "none", (), "h100:8", 2),
        ("bfloat16", "none", ("optimizer", "gradients"), "h100:8", 2),
        # JAX reads a parameter of its own type where it lies; gathered and run again, casts are made again.
        ("float32", "none", (), "h100:8", 0),
        ("bfloat16", "full", (), "h100:8", 0),
        ("bfloat16", "none", ("stored", "optimizer", "gradients"), "h100:8", 0),
        # A TPU's compiler casts before the loop.
        ("bfloat16", "full", (), "v5p:2x2x2", 2),
        ("bfloat16", "full", ("stored", "optimizer", "gradients"), "v5p:2x2x2", 2 / 8),
    ],
)
def test_casts_of_layers_parameters_are_kept_as_these_lie(kind, remat, cut, topology, size):
    loss, layers, table = moments_of(kind, remat, cut=cut, topology=topology)
    assert loss.get("casts", 0.0) == layers.get("casts", 0.0) == size * MATRICES
    assert "casts" not in table


def test_a_gradient_that_is_reduced_to_parts_is_whole_before():
    head = EMBED * IDS
    whole = moments_of("bfloat16", "full")
    parts = moments_of("bfloat16", "full", cut=("optimizer", "gradients"))
    gathered = moments_of("bfloat16", "full", cut=("stored", "optimizer", "gradients"))
    # The cast of the loss's parameter, and its gradient where what lies there for gradients is a part.
    assert [one[0]["communication"] for one in (whole, parts, gathered)] == [2 * head, 6 * head, 6 * head]
    # The table's, which a step reads where it lies if it lies in parts itself.
    assert [one[2]["communication"] for one in (whole, parts, gathered)] == [0, 2 * head, 0]


def test_a_tables_gradient_is_not_there_while_layers_go_back():
    loss, layers, table = (one["gradients"] for one in moments_of("bfloat16", "full"))
    assert (loss, layers - loss, table - layers) == (4 * EMBED * IDS, 4 * MATRICES, 4 * EMBED * IDS)


def test_microbatches_sum_gradients_as_parameters_lie_which_are_reduced_once():
    all_of_it = 4 * (MATRICES + 2 * EMBED * IDS)
    for cut, parts in ((), 1), (("optimizer", "gradients"), 1), (("stored", "optimizer", "gradients"), 8):
        loss, layers, table = (one["gradients"] for one in moments_of("bfloat16", "full", cut, 2))
        # A microbatch's own come beside the sum: the table's last, after those of the layers.
        assert (loss, table) == (all_of_it / parts, 2 * all_of_it / parts)
        assert table - layers == 4 * EMBED * IDS / parts


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_jax_gives_a_loops_backward_pass_the_casts_of_all_layers(kind):
    shape = jax.ShapeDtypeStruct
    layers = {"down": shape((DEPTH, INNER, EMBED), "float32"), "up": shape((DEPTH, EMBED, INNER), "float32")}
    params = {
        "head": shape((EMBED, IDS), "float32"),
        "table": shape((IDS, EMBED), "float32"),
        "layers": layers,
    }
    ids = shape((64,), "int32")
    text = str(jax.make_jaxpr(jax.grad(lambda p, i: read(p, i, i, kind)))(params, ids))
    stacks = [
        f"bf16[{DEPTH},{one}]" in text.split("scan[")[0] for one in (f"{EMBED},{INNER}", f"{INNER},{EMBED}")
    ]
    assert stacks == [kind == "bfloat16"] * 2
