"""Two stacks of layers over stages: an encoder and a decoder, dense layers and then experts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.sharding import UserError, declare, plan
from meshwright.sharding.transform.pipeline.beside import (
    backward_later,
    forward_later,
    stack_rounds,
    waits,
)
from meshwright.sharding.transform.pipeline.schedule import (
    BACKWARD,
    EMBED,
    FORWARD,
    HEAD,
    LEARN,
    backward_at,
    forward_at,
)

WIDTH, VOCAB, TIME, FIRST, SECOND = 16, 32, 8, 5, 4


def init(scanned: bool = True, width: int = WIDTH, first: int = FIRST, second: int = SECOND) -> Any:
    keys = iter(jax.random.split(jax.random.key(0), 100))

    def normal(*shape: int, by: float = 1.0) -> Any:
        return draws.normal(next(keys), shape) * by / shape[0] ** 0.5

    def layer() -> dict[str, Any]:
        return {
            "q": normal(width, width, by=2.0),
            "k": normal(width, width, by=2.0),
            "up": normal(width, 2 * width),
            "down": normal(2 * width, width),
        }

    stacks = {"first": [layer() for _ in range(first)], "second": [layer() for _ in range(second)]}
    if scanned:
        stacks = {name: jax.tree.map(lambda *one: jnp.stack(one), *some) for name, some in stacks.items()}
    return {**stacks, "table": normal(VOCAB, width, by=4.0), "between": normal(width), "gate": normal(width)}


def batch(rows: int) -> Any:
    ids = np.random.default_rng(0).integers(0, VOCAB, (3, rows, TIME)).astype(np.int32)
    return dict(zip(("source", "tokens", "targets"), ids, strict=True))


def rms(x: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def attend(own: Any, x: Any, to: Any) -> Any:
    scores = jnp.einsum("bqd,bkd->bqk", rms(x) @ own["q"], to @ own["k"]) / WIDTH**0.5
    return x + jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), to)


def through(layers: Any, body: Any, x: Any) -> tuple[Any, Any]:
    if isinstance(layers, dict):
        return jax.lax.scan(body, x, layers)
    given = []
    for own in layers:
        x, one = body(x, own)
        given.append(one)
    return x, jnp.stack(given)


def encoder_decoder(params: Any, batch: Any) -> Any:
    """A tied table, what encoder layers share, outputs of layers, the encoder read at the end."""
    seen = (batch["source"] > 3).astype(jnp.float32)[..., None]

    def encode(x: Any, own: Any) -> Any:
        x = attend(own, x, rms(x) * seen) + params["gate"] * seen
        return x + jnp.tanh(rms(x) @ own["up"]) @ own["down"], jnp.square(x).mean()

    source, sizes = through(params["first"], encode, params["table"][batch["source"]])
    source = rms(source) * params["between"]

    def decode(x: Any, own: Any) -> Any:
        x = attend(own, x, source)
        return x + jax.nn.silu(rms(x) @ own["up"]) @ own["down"], x[:, 0]

    x, first = through(params["second"], decode, params["table"][batch["tokens"]])
    logits = (rms(x) + 0.1 * source.mean(1, keepdims=True)) @ params["table"].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    counted = batch["targets"] > 0
    loss = jnp.where(counted, losses, 0).sum() / counted.sum()
    return loss + 0.01 * sizes.sum() + 0.01 * jnp.square(first).mean(), {
        "sizes": sizes,
        "each": losses.sum(1),
    }


def dense_then_experts(params: Any, batch: Any) -> Any:
    """What one stack gives goes into the other as it is; a balance loss of the whole batch in the second."""

    def dense(x: Any, own: Any) -> Any:
        x = attend(own, x, rms(x))
        return x + jnp.tanh(rms(x) @ own["up"]) @ own["down"], jnp.square(x).mean()

    def experts(x: Any, own: Any) -> Any:
        x = attend(own, x, rms(x))
        shares = jax.nn.softmax(2 * rms(x) @ own["q"][:, :4])
        inner = jnp.tanh(rms(x) @ own["up"]).reshape(*x.shape[:2], 4, -1) * shares[..., None]
        return x + inner.reshape(*x.shape[:2], -1) @ own["down"], jnp.square(shares.mean((0, 1))).sum()

    x, sizes = through(params["first"], dense, params["table"][batch["tokens"]])
    x, balance = through(params["second"], experts, x)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        (rms(x) * params["between"]) @ params["table"].T, batch["targets"]
    )
    return losses.mean() + 0.1 * balance.sum() + 0.01 * sizes.sum() + (params["gate"] ** 2).sum(), {}


LOSSES = {"encoder_decoder": encoder_decoder, "dense_then_experts": dense_then_experts}


def worst(found: Any, wanted: Any) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


@pytest.mark.once("sharding/transform/test_nonfinite.py")
@pytest.mark.numerics
@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("name", "scanned", "mesh", "microbatches", "rows", "interleave", "schedule"),
    [
        ("encoder_decoder", True, {"stage": 2}, 3, 24, 1, "1f1b"),
        pytest.param(
            *("encoder_decoder", True, {"stage": 2, "fsdp": 2}, 3, 24, 2, "delayed"), marks=pytest.mark.slow
        ),
        pytest.param(
            *("dense_then_experts", False, {"stage": 2}, 5, 15, 1, "delayed"), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_both_stacks_keep_values_and_gradients(
    name: str, scanned: bool, mesh: dict, microbatches: int, rows: int, interleave: int, schedule: str
) -> None:
    count = int(np.prod(list(mesh.values())))
    params, data = init(scanned), batch(rows)
    how = {"mesh": mesh, "microbatches": microbatches, "schedule": schedule, "interleave": interleave}
    made = declare(LOSSES[name], params, data, topology=f"cpu:{count}", **how)
    devices = made.make_mesh(devices=jax.devices()[:count])
    where = made.shardings(params, devices), made.shardings(data, devices, "batch")
    found = jax.jit(jax.value_and_grad(made.apply(LOSSES[name], mesh=devices), has_aux=True))
    plain = jax.jit(jax.value_and_grad(LOSSES[name], has_aux=True))(params, data)
    value, gradient = map(worst, found(*jax.device_put((params, data), where)), plain)
    assert value < 1e-6
    assert gradient < 1e-5


@pytest.mark.parametrize(
    ("chunks", "counts", "cut"),
    [(1, (4, 4), True), (1, (5, 8), True), (1, (3, 8), False), (2, (4, 8), True), (2, (3, 8), False)],
    ids=str,
)
def test_stages_store_the_layers_of_every_long_stack(chunks: int, counts: tuple, cut: bool) -> None:
    shapes = jax.eval_shape(lambda: init(first=counts[0], second=counts[1]))
    how = {"mesh": {"stage": 2}, "microbatches": 4, "interleave": chunks}
    made = declare(encoder_decoder, shapes, batch(8), topology="cpu:2", **how)
    assert all(("stage" in str(made.params[f"first/{name}"].spec)) == cut for name in ("q", "up", "down"))
    assert all("stage" in str(made.params[f"second/{name}"].spec) for name in ("q", "up", "down"))


def test_chunks_that_one_of_the_stacks_has_no_layers_for_are_refused() -> None:
    shapes = jax.eval_shape(lambda: init(first=5, second=8))
    how = {"microbatches": 4, "interleave": 4}
    said = "8 chunks are more than the 5 layers of first; nearest: interleave=2"
    with pytest.raises(UserError, match=said):
        declare(encoder_decoder, shapes, batch(8), topology="cpu:2", mesh={"stage": 2}, **how)
    how |= {"topology": "v5p:2x2x1", "mesh": {"stage": 2, "data": 2}, "optimizer": optax.sgd(1.0)}
    with pytest.raises(UserError, match=said):
        plan(encoder_decoder, shapes, batch(16), **how)


def test_a_stack_that_stages_do_not_cut_is_told() -> None:
    shapes = jax.eval_shape(lambda: init(first=3, second=8))
    made = declare(encoder_decoder, shapes, batch(8), topology="cpu:2", mesh={"stage": 2}, microbatches=4)
    assert any(note.startswith("first, 3 layers, lies whole on each of stage=2") for note in made.notes)


@pytest.mark.numerics(False)
@pytest.mark.devices(8)
@pytest.mark.slow
def test_memory_is_that_of_a_stages_layers_however_many_microbatches_there_are() -> None:
    def loss(params: Any, batch: Any) -> Any:
        x = batch
        for name in ("first", "second"):
            x, _ = jax.lax.scan(lambda x, own: (x + jnp.tanh(x @ own), None), x, params[name])
            x = 2 * x
        return jnp.square(x).mean()

    params = {name: jax.ShapeDtypeStruct((4, 64, 64), jnp.float32) for name in ("first", "second")}
    held = []
    for microbatches in (4, 16):
        rows = jax.ShapeDtypeStruct((2 * microbatches, 64), jnp.float32)
        made = declare(loss, params, rows, topology="cpu:2", mesh={"stage": 2}, microbatches=microbatches)
        devices = made.make_mesh(devices=jax.devices()[:2])
        where = made.shardings(params, devices), made.shardings(rows, devices, "batch")
        args = jax.tree.map(
            lambda one, lies: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=lies), (params, rows), where
        )
        step = jax.jit(jax.value_and_grad(made.apply(loss, mesh=devices)))
        memory = step.lower(*args).compile().memory_analysis()
        held.append(memory.temp_size_in_bytes)
        # Half of the parameters, and of their gradients, and the batch.
        assert memory.argument_size_in_bytes == 4 * 64 * 64 * 4 + rows.size * 4
        assert memory.output_size_in_bytes < 4 * 64 * 64 * 4 + 1024
    assert held[1] < 1.02 * held[0]


@pytest.mark.parametrize("stacks", [2, 3])
@pytest.mark.parametrize(
    ("stages", "microbatches", "chunks"),
    [(2, 1, 1), (2, 8, 1), (4, 3, 1), (4, 20, 1), (2, 8, 2), (2, 3, 4), (4, 5, 2)],
)
def test_a_schedule_of_stacks_takes_all_of_them_through_in_order(
    stages: int, microbatches: int, chunks: int, stacks: int
) -> None:
    done: dict[tuple[str, int, int, int, int], int] = {}
    taken: Counter[tuple[str, int]] = Counter()
    found = stack_rounds(stages, microbatches, stacks, chunks, learns=True)
    ticks = [
        work
        for one in found
        for _ in range(one.times)
        for each in one.stretches
        for work in [each.work] * each.ticks
    ]
    shape = (stages, chunks)
    for t, work in enumerate(ticks, start=-1):
        for what, stack in work:
            taken[what, stack] += 1
            ahead = forward_later(stack, stages, chunks)
            back = backward_later(stack, stacks, stages, chunks)
            units = {
                FORWARD: [forward_at(t - ahead, s, *shape) for s in range(stages)],
                BACKWARD: [backward_at(t - back, s, *shape) for s in range(stages)],
                EMBED: [forward_at(t + 1 - ahead, 0, *shape)],
                LEARN: [backward_at(t - 1 - back, 0, *shape)],
                HEAD: [forward_at(t - ahead, stages - 1, *shape)],
            }
            for s, unit in enumerate(units[what]):
                wanted = {EMBED: 0, LEARN: 0, HEAD: chunks - 1}.get(what, unit.chunk)
                if 0 <= unit.microbatch < microbatches:
                    assert unit.chunk == wanted
                    key = (what, stack, s, unit.microbatch, unit.chunk)
                    assert key not in done
                    done[key] = t
    last, end = stages - 1, chunks - 1
    for m in range(microbatches):
        for k in range(stacks):
            entered, left = done[FORWARD, k, 0, m, 0], done[FORWARD, k, last, m, end]
            began, ended = done[BACKWARD, k, last, m, end], done[BACKWARD, k, 0, m, 0]
            assert done[EMBED, k, 0, m, 0] == entered - 1
            assert done[LEARN, k, 0, m, 0] == ended + 1
            for c in range(chunks):
                forward, backward = done[FORWARD, k, 0, m, c], done[BACKWARD, k, 0, m, c]
                assert [done[FORWARD, k, s, m, c] - forward for s in range(stages)] == list(range(stages))
                assert [backward - done[BACKWARD, k, s, m, c] for s in range(stages)] == list(range(stages))
                assert forward - entered == ended - backward == c * stages
            # What a stage holds of a microbatch's input until it is needed again.
            assert ended - entered == 2 * (stages * chunks - 1) + waits(k, stacks, *shape)
            if k:
                assert done[EMBED, k, 0, m, 0] == done[FORWARD, k - 1, last, m, end]
                assert done[LEARN, k, 0, m, 0] == done[BACKWARD, k - 1, last, m, end]
        assert done[HEAD, stacks - 1, 0, m, end] == left == began
    slots = microbatches if chunks == 1 else -(-microbatches // stages) * stages
    layers = {taken[what, k] for what in (FORWARD, BACKWARD) for k in range(stacks)}
    assert layers == {slots * chunks + stages - 1}
    if chunks > 1:
        assert {taken[EMBED, k] for k in range(1, stacks)} == {taken[HEAD, stacks - 1]} == {slots}


@pytest.mark.parametrize(("first", "held"), [(8, 16 / 4), (6, 6 + 8 / 4)])
def test_a_price_counts_what_a_stage_has_of_each_stack(first: int, held: float) -> None:
    shapes = jax.eval_shape(lambda: init(width=64, first=first, second=8))
    how = {"mesh": {"stage": 4}, "microbatches": 8, "interleave": 1, "remat": "full"}
    made = plan(encoder_decoder, shapes, batch(32), optimizer=optax.adam(1e-3), topology="v5p:2x2x1", **how)
    assert made.estimate is not None
    layer = sum(leaf.size // leaf.shape[0] for leaf in shapes["second"].values())
    rest = sum(shapes[name].size for name in ("table", "between", "gate"))
    assert made.estimate.memory["optimizer"] == pytest.approx(8 * (held * layer + rest), rel=0.01)
    assert made.estimate.time["send/stage"] > 0
