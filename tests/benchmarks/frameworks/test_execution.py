"""What frameworks do otherwise than XLA, in the price of a small layered network."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from meshwright.sharding import Topology
from meshwright.sharding.cost import Candidate, Pricer
from meshwright.sharding.cost.collectives import links
from meshwright.sharding.program import trace

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from frameworks.execution import deal_by_weight, dealt_by, execution_of, loss_layers
from frameworks.record import Framework
from frameworks.stages import Dealt

LAYERS, BATCH, WIDTH, HIDDEN = 4, 64, 256, 1024
WEIGHTS = LAYERS * 2 * WIDTH * HIDDEN
TOPOLOGY = Topology.parse("h100:8")


def loss(params, batch):
    def layer(x, weights):
        return x + jnp.dot(jax.nn.gelu(jnp.dot(x, weights["up"])), weights["down"]), None

    x, _ = jax.lax.scan(layer, batch, {"up": params["up"], "down": params["down"]})
    return jnp.sum(jax.nn.log_softmax(jnp.dot(x, params["head"]).astype(jnp.float32)))


@pytest.fixture(scope="module")
def program():
    shape = jax.ShapeDtypeStruct
    params = {
        "down": shape((LAYERS, HIDDEN, WIDTH), jnp.bfloat16),
        "head": shape((WIDTH, HIDDEN), jnp.bfloat16),
        "up": shape((LAYERS, WIDTH, HIDDEN), jnp.bfloat16),
    }
    return trace(loss, params, shape((BATCH, WIDTH), jnp.bfloat16))


def pricer(program, **fields):
    record = Framework(**fields)
    execution = execution_of(record, TOPOLOGY)
    return Pricer(program, TOPOLOGY, calibration=record, execution=execution)


def price(program, candidate=None, **fields):
    return pricer(program, **fields).price(candidate or Candidate(mesh={}, dims={}))


def at(program, axis, **named):
    return Candidate(mesh={axis: 8}, dims={program.batch_dims[0]: (axis,)}, **named)


def test_a_framework_may_run_all_of_a_layer_again(program):
    full = Candidate(mesh={}, dims={}, remat="full")
    times = [
        price(program, candidate, reruns_layers=again).time["compute/matmul"]
        for candidate, again in ((Candidate(mesh={}, dims={}), True), (full, True), (full, False))
    ]
    plain, whole, needed = times
    assert needed > plain
    # Both products of a layer, where XLA runs the first one again: no gradient needs the second's result.
    assert whole - plain == pytest.approx(2 * (needed - plain))


def test_gradients_summed_in_place_take_no_more_for_more_microbatches(program):
    found = [
        price(program, at(program, "data", microbatches=2), accumulates_in_place=inside).memory["gradients"]
        for inside in (True, False)
    ]
    size = 2 * (WEIGHTS + WIDTH * HIDDEN)
    assert found == pytest.approx([size, 2 * size])


def test_a_loss_of_many_kernels_takes_longer_and_holds_more(program):
    one, more = price(program), price(program, loss_passes=3.0, loss_copies=2.0)
    assert more.time["compute/elementwise"] > one.time["compute/elementwise"]
    assert more.time["compute/matmul"] == one.time["compute/matmul"]
    assert more.memory["temporaries"] >= one.memory["temporaries"]


def test_a_framework_that_waits_for_the_device_adds_its_layers(program):
    found = price(program, layer_seconds=1e-3).time["host"] - price(program).time.get("host", 0.0)
    assert found == pytest.approx(LAYERS * 1e-3)


def test_what_a_framework_holds_is_one_item(program):
    plain = price(program, at(program, "data"))
    held = price(program, at(program, "data"), copy_bytes=2.0, reserved_bytes=1e6, memory_overhead=0.5)
    passing = sum(plain.memory[item] for item in ("saved_activations", "temporaries", "communication"))
    assert plain.memory["framework"] == 0.0
    copies = 2.0 * (WEIGHTS + WIDTH * HIDDEN)
    assert held.memory["framework"] == pytest.approx(copies + 1e6 + 0.5 * passing)
    others = {item: size for item, size in held.memory.items() if item != "framework"}
    assert others == {item: size for item, size in plain.memory.items() if item != "framework"}


def test_what_fused_kernels_read_is_less_than_what_each_operation_keeps(program):
    each, fused = (price(program, fused_residuals=fused) for fused in (False, True))
    assert fused.memory["saved_activations"] < each.memory["saved_activations"]


def test_small_groups_use_few_links_and_stages_slow_the_start_of_exchanges():
    mesh = {"stage": 2, "tensor": 4}
    record = Framework(fabric_seconds=1e-5, fabric_group_exponent=0.5, pipelined_starts=8.0)
    own = execution_of(record, TOPOLOGY).links(mesh, TOPOLOGY, record)
    plain = links(mesh, TOPOLOGY, record)
    assert own["tensor"].bytes_per_second == pytest.approx(plain["tensor"].bytes_per_second * 0.5**0.5)
    assert own["tensor"].seconds == pytest.approx(8.0 * plain["tensor"].seconds)
    assert own["stage"].seconds == pytest.approx(plain["stage"].seconds)


def test_layers_are_dealt_beside_a_loss_that_weighs_some(program):
    # 32 layers and a loss of 2.2 over four stages: nine layers each, and what is left for the last one.
    assert deal_by_weight(32, 4, 2.2) == Dealt(most=9, last=6)
    assert deal_by_weight(16, 1, 3.0) == Dealt(most=16, last=16)
    assert deal_by_weight(4, 4, 9.0).last == 0
    profile = pricer(program).profile
    # The head is one product where a layer has two.
    assert loss_layers(profile) == pytest.approx(0.5)
    assert dealt_by(Framework(balanced_stages=True))(profile, 2) == Dealt(most=3, last=1)
    assert dealt_by(Framework())(profile, 2) == Dealt(most=2, last=2)


def test_what_xla_does_on_a_gpu_is_no_frameworks_way():
    assert not execution_of(Framework(), TOPOLOGY).reduces_whole
    fused = execution_of(dataclasses.replace(Framework(), fused_attention=True), TOPOLOGY)
    assert fused.attention is not None
