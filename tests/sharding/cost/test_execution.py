"""Executions: XLA's by topology, and others through the same interface."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import Topology
from meshwright.sharding.cost import Calibration, Candidate, Execution, Pricer, compute
from meshwright.sharding.cost.compute import FusedAttention
from meshwright.sharding.cost.execution import execution_for
from meshwright.sharding.cost.pipeline import through_stages
from meshwright.sharding.program import trace

TOPOLOGY = Topology.parse("v5p:2x2x2")


@pytest.fixture(scope="module")
def program():
    def loss(params, batch):
        def layer(x, weights):
            return jnp.tanh(x @ weights["up"]) @ weights["down"], None

        return jnp.sum(jax.lax.scan(layer, batch, params)[0])

    shape = jax.ShapeDtypeStruct
    params = {"up": shape((4, 128, 256), jnp.float32), "down": shape((4, 256, 128), jnp.float32)}
    names = {"up": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed")}
    return trace(loss, params, shape((64, 128), jnp.float32), names=names)


def test_a_pricer_runs_as_the_topologys_compiler_does(program):
    assert Pricer(program, TOPOLOGY).execution == execution_for(TOPOLOGY)
    assert execution_for(TOPOLOGY).last_layer_apart
    assert not execution_for(TOPOLOGY).reduces_whole
    kernel = FusedAttention(share=0.5, gradient=2.5)
    assert execution_for(Topology.parse("h100:8"), kernel) == Execution(
        attention=kernel,
        reduces_whole=True,
        scatters_wait=1.0,
        sums_wait=0.4,
        gradient_beside=True,
        makes_ahead=True,
        zeros_together=True,
        aligned_elements=8,
        takes_out=True,
    )


def test_each_part_of_a_price_can_be_another(program):
    def busy(profile, once, kept):
        found = compute.busy(profile, once, kept)
        return dataclasses.replace(found, waiting=np.full(3, 1.0))

    def staged(parts):
        return {**through_stages(parts), "bubble": 2.0}

    def moments(*given):
        for items in Execution().moments(*given):
            yield {**items, "framework": 7.0}

    dims = {dim.id: ("stage",) for dim in program.dims if dim.name == "layers"}
    two = Candidate(mesh={"stage": 2, "data": 4}, dims=dims, microbatches=2)
    plain = Pricer(program, TOPOLOGY, calibration=Calibration())
    before = plain.price(two)
    for change, differs in (
        ({"busy": busy}, lambda found: found.time["host"] > 1.0),
        ({"through_stages": staged}, lambda found: found.time["bubble"] == 2.0),
        ({"moments": moments}, lambda found: found.peak_bytes == before.peak_bytes + 7.0),
    ):
        execution = dataclasses.replace(plain.execution, **change)
        found = Pricer(program, TOPOLOGY, calibration=Calibration(), execution=execution).price(two)
        assert differs(found), change


def test_times_under_another_execution_leave_a_pricers_own_as_they_are(program):
    pricer = Pricer(program, TOPOLOGY, calibration=Calibration())
    candidate = Candidate(mesh={}, dims={})
    placement = pricer.place(candidate)
    over = pricer.stored_over(candidate, placement)
    memory = pricer.memory(candidate, placement, over)
    own = pricer.time(candidate, placement, over, memory)
    slow = pricer.time(candidate, placement, over, memory, Calibration(memory_efficiency=0.25))
    assert slow["compute/matmul"] > own["compute/matmul"]
    assert pricer.time(candidate, placement, over, memory) == own
