"""The price of stages in lockstep: its ticks are those of the schedule, and what they take can be counted."""

import jax
import jax.numpy as jnp
import pytest
from meshwright.sharding import Topology, declare
from meshwright.sharding.cost import Calibration, Candidate, Pricer
from meshwright.sharding.cost.collectives import links
from meshwright.sharding.cost.pipeline import Lockstep
from meshwright.sharding.ops.experts import experts
from meshwright.sharding.program import trace
from meshwright.sharding.transform.pipeline.schedule import (
    BACKWARD,
    EMBED,
    FORWARD,
    HEAD,
    LEARN,
    WEIGHTS,
    ring,
    rounds,
)

LAYERS, BATCH, WIDTH, HIDDEN, VOCAB = 8, 65536, 256, 1024, 512
HBM = Topology.parse("v5p:2x2x1").chip.hbm_bytes_per_second


@pytest.fixture(scope="module")
def price():
    def loss(params, batch):
        def layer(x, weights):
            return x + jnp.tanh(x @ weights["up"]) @ weights["down"], None

        x, _ = jax.lax.scan(layer, batch @ params["in"], params["layers"])
        return jnp.mean(x @ params["head"])

    shape = jax.ShapeDtypeStruct
    params = {
        "in": shape((VOCAB, WIDTH), jnp.float32),
        "layers": {
            "up": shape((LAYERS, WIDTH, HIDDEN), jnp.float32),
            "down": shape((LAYERS, HIDDEN, WIDTH), jnp.float32),
        },
        "head": shape((WIDTH, VOCAB), jnp.float32),
    }
    names = {
        "in": ("vocab", "embed"),
        "layers": {"up": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed")},
        "head": ("embed", "vocab"),
    }
    program = trace(loss, params, shape((BATCH, VOCAB), jnp.float32), names=names)
    pricers = {
        where: Pricer(program, Topology.parse(where), calibration=Calibration(), dtype="float32")
        for where in ("v5p:2x2x1", "h100:4")
    }
    layers = next(dim.id for dim in program.dims if dim.name == "layers")

    def price(microbatches, where="v5p:2x2x1", stages=4, **more):
        mesh = {"stage": stages} if stages > 1 else {}
        dims = {layers: ("stage",)} if stages > 1 else {}
        return pricers[where].price(Candidate(mesh=mesh, dims=dims, microbatches=microbatches, **more))

    return price


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize(
    ("stages", "microbatches", "chunks"), [(4, 8, 1), (2, 3, 1), (8, 8, 1), (4, 8, 2), (4, 6, 3), (2, 1, 2)]
)
def test_ticks_are_those_of_the_schedule(stages, microbatches, chunks, delayed):
    ticks = Lockstep(stages=stages, chunks=chunks, microbatches=microbatches, delayed=delayed)
    done = rounds(stages, microbatches, chunks, learns=True, delayed=delayed)
    for work, count in (
        (FORWARD, ticks.layer_ticks),
        (BACKWARD, ticks.layer_ticks),
        (HEAD, ticks.head_ticks),
        (EMBED, ticks.embed_ticks),
        (LEARN, ticks.slots if delayed else ticks.embed_ticks),
        (WEIGHTS, ticks.weight_ticks if delayed else 0),
    ):
        found = sum(one.ticks * whole.times for whole in done for one in whole.stretches if work in one.work)
        assert found == count, work
    assert ring(stages, chunks) == ticks.inputs


def test_layers_run_once_more_and_the_head_is_shared(price):
    # In products of a layer's two and of what is outside: forward, twice backward, and a layer's once more.
    alone, found = price(8, stages=1), price(8)
    flops = 2 * BATCH * 2 * WIDTH * HIDDEN * LAYERS, 2 * BATCH * WIDTH * VOCAB
    plain = 3 * flops[0] + (2 + 3) * flops[1]
    staged = (4 * flops[0] + (2 + 3) * flops[1]) / 4
    took = found.time["compute/matmul"] / alone.time["compute/matmul"]
    assert took == pytest.approx(staged / plain, rel=0.02)


def test_a_bubble_shrinks_with_microbatches_and_chunks(price):
    waits = [price(count).time["bubble"] for count in (4, 8, 16)]
    assert waits[0] > 1.8 * waits[1] > 3.2 * waits[2]
    chunks = price(16, interleave=2)
    assert chunks.time["bubble"] < 0.6 * waits[2]
    # What a chunk costs besides: less to hide a send behind, and layers that come from where they are stored.
    assert chunks.time["send/stage"] > price(16).time["send/stage"]
    assert chunks.time["all_to_all/stage"] > 0


@pytest.mark.parametrize("microbatches", [8, 16])
def test_of_what_is_sent_on_only_the_first_ticks_show(price, microbatches):
    """What goes back to a head shows as far as half of adding up the chunk's gradients does not hide it."""
    stages = 4
    topology = Topology.parse("v5p:2x2x1")
    link = links({"stage": stages}, topology, Calibration())["stage"]
    each = link.point_to_point(4.0 * WIDTH * BATCH / microbatches)
    gradients = 4.0 * 2 * WIDTH * HIDDEN * LAYERS / stages
    added = 3 * gradients / topology.chip.hbm_bytes_per_second
    assert each > added
    shows = (stages - 1) * each + microbatches * (each - added / 2)
    assert price(microbatches).time["send/stage"] == pytest.approx(shows)


def test_memory_of_more_microbatches_of_as_many_rows_is_that_of_few(price):
    # Half as many rows each: half as much is kept, however many there are.
    held = {count: price(count).memory["saved_activations"] for count in (8, 16, 32)}
    assert held[16] == pytest.approx(held[8] / 2)
    assert held[32] == pytest.approx(held[8] / 4)
    stream = 4 * BATCH / 8 * WIDTH
    inputs = price(8, interleave=2).memory["saved_activations"] - held[8]
    assert inputs <= 8 * stream


@pytest.mark.parametrize("chunks", [1, 2])
def test_memory_of_a_chunk_s_turn_can_be_counted(price, chunks):
    # Weights of all layers, which are the layers' whole; those of what is outside beside them.
    layers, outside = 2 * WIDTH * HIDDEN * LAYERS, 2 * VOCAB * WIDTH
    found = price(8, interleave=chunks, remat="full").memory
    here = layers / 4 + outside
    assert found["optimizer"] == 8 * here
    # For products they are cast to two bytes, and chunks are cut out of them for the way on and the way back.
    cut_out = 2 * layers / 8 if chunks == 2 else 0
    assert found["params"] == pytest.approx(4 * here + 2 * here + 2 * cut_out)
    # Sums of all, one chunk's and the head's beside them.
    assert found["gradients"] == pytest.approx(4 * (here + layers / 4 / chunks + VOCAB * WIDTH))
    stream = 4 * BATCH / 8 * WIDTH
    inputs = 2 * 4 * chunks - 1
    assert found["saved_activations"] == pytest.approx(stream * (inputs + 5 + LAYERS / 4 / chunks), rel=0.02)
    # Of the layer what it begins with, its largest value, in whose place the gradient is made, what it adds.
    assert found["temporaries"] == pytest.approx(4 * BATCH / 8 * (HIDDEN + 2 * WIDTH))


def test_delayed_gradients_of_weights_are_not_waited_for_and_are_kept(price):
    plain, delayed = price(16), price(16, schedule="delayed")
    # Of four products that a layer's weight has, one forward, one again and one back are waited for.
    flops = 2 * BATCH * 2 * WIDTH * HIDDEN * LAYERS, 2 * BATCH * WIDTH * VOCAB
    late = plain.time["compute/matmul"] * flops[0] / (4 * flops[0] + 5 * flops[1])
    waited = plain.time["bubble"] - delayed.time["bubble"]
    assert waited == pytest.approx(late * 3 / 16, rel=0.02)
    assert delayed.time["compute/matmul"] == plain.time["compute/matmul"]
    # Two operands and two results of each layer, in two bytes as products take them, of four chunks and the
    # one that is being made: they are stacked, put into their room and taken out of it in each of 19 ticks.
    each = 2 * (BATCH // 16) * 2 * (WIDTH + HIDDEN) * (LAYERS // 4)
    more = delayed.memory["saved_activations"] - plain.memory["saved_activations"]
    assert more == 5 * each
    assert delayed.time["kept"] == pytest.approx((6 * 19 + 4) * each / HBM)


def test_what_layers_keep_over_ticks_takes_room_and_time_and_spares_running_chunks_again(price):
    again, kept = (price(16, remat="dots", stage_remat=one) for one in (True, False))
    # A layer's input and the result of its first product, of as many chunks as inputs were held of.
    stream = 4 * (BATCH // 16) * WIDTH
    each = 4 * (BATCH // 16) * (HIDDEN + WIDTH) * (LAYERS // 4)
    more = kept.memory["saved_activations"] - again.memory["saved_activations"]
    assert more == pytest.approx(7 * (each - stream), rel=0.03)
    assert kept.time["kept"] == pytest.approx((6 * 19 + 7) * each / HBM, rel=0.03)
    assert "kept" not in again.time
    flops = 2 * BATCH * 2 * WIDTH * HIDDEN * LAYERS, 2 * BATCH * WIDTH * VOCAB
    spared = 1 - kept.time["compute/matmul"] / again.time["compute/matmul"]
    assert spared == pytest.approx(flops[0] / (4 * flops[0] + 5 * flops[1]), rel=0.02)


def test_where_a_compiler_takes_out_what_a_tick_works_with_that_lies_in_memory_too(price):
    """XLA for GPUs: the chunk that goes back, what delayed gradients are made of, and sums of gradients."""
    kept = 4 * (BATCH // 16) * (HIDDEN + WIDTH) * (LAYERS // 4)
    late = 2 * (BATCH // 16) * 2 * (WIDTH + HIDDEN) * (LAYERS // 4)
    for more, taken in (
        ({}, 0),
        ({"stage_remat": False}, kept),
        # GPUs keep it as it is, in four bytes.
        ({"schedule": "delayed"}, 6 * 2 * late - 5 * late),
    ):
        here, there = (price(16, one, remat="dots", **more).memory for one in ("v5p:2x2x1", "h100:4"))
        assert there["saved_activations"] - here["saved_activations"] == pytest.approx(taken, rel=0.03)
        assert there["gradients"] - here["gradients"] == 4 * 2 * WIDTH * HIDDEN * LAYERS // 4


def test_gradients_of_experts_are_not_delayed_in_the_price_either():
    def loss(params, x):
        def layer(x, own):
            weights, chosen = jax.lax.top_k(jax.nn.softmax(x @ own["router"]), 2)
            return x + experts(x, weights, chosen, up=own["up"], down=own["down"]), None

        return jnp.square(jax.lax.scan(layer, x, params)[0]).mean()

    sizes = {"router": (4, 256, 8), "up": (4, 8, 256, 512), "down": (4, 8, 512, 256)}
    params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in sizes.items()}
    x = jax.ShapeDtypeStruct((64, 128, 256), "float32")
    how = {"topology": "v5p:2x2x1", "mesh": {"stage": 4}, "microbatches": 8}
    plain, delayed = (declare(loss, params, x, schedule=one, **how) for one in ("1f1b", "delayed"))
    assert delayed.estimate.time["bubble"] == pytest.approx(plain.estimate.time["bubble"], rel=0.02)
    assert any("delays no gradients of experts" in note for note in delayed.notes)
    assert not any("delays no gradients of experts" in note for note in plain.notes)
