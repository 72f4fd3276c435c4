"""Calibrations fitted to runs: what they tell is found, what they do not tell stays, outliers pull little."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from meshwright.sharding import Topology
from meshwright.sharding.cost import Candidate, Pricer
from meshwright.sharding.program import trace

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from frameworks.execution import execution_of
from frameworks.fit import Measured, calibrate, calibrate_memory, error, usable_memory
from frameworks.record import Framework

TRUE = Framework(
    matmul_efficiency=0.62, memory_efficiency=0.8, kernel_seconds=2e-5, step_seconds=0.02, overlap_stages=0.1
)
START = dataclasses.replace(
    TRUE, matmul_efficiency=0.8, memory_efficiency=0.6, kernel_seconds=5e-6, step_seconds=0.01
)
FIELDS = ("matmul_efficiency", "memory_efficiency", "kernel_seconds", "step_seconds", "overlap_stages")


def loss(params, batch):
    def layer(x, weights):
        return x + jnp.dot(jax.nn.gelu(jnp.dot(x, weights["up"])), weights["down"]), None

    x, _ = jax.lax.scan(layer, batch, params)
    return jnp.sum(x.astype(jnp.float32))


@pytest.fixture(scope="module")
def runs():
    found = []
    for width, rows in ((512, 256), (2048, 1024), (4096, 8192), (4096, 65536)):
        shape = jax.ShapeDtypeStruct
        params = {
            "up": shape((8, width, 4 * width), jnp.bfloat16),
            "down": shape((8, 4 * width, width), jnp.bfloat16),
        }
        program = trace(loss, params, shape((rows, width), jnp.bfloat16))
        for count in (1, 4):
            topology = Topology.parse("h100:1")
            execution = execution_of(TRUE, topology)
            pricer = Pricer(program, topology, calibration=TRUE, execution=execution)
            candidate = Candidate(mesh={}, dims={}, microbatches=count)
            seconds = pricer.price(candidate).step_seconds
            found.append(Measured(pricer=pricer, candidate=candidate, seconds=seconds))
    return found


def test_fields_that_runs_tell_apart_are_found_together(runs):
    assert error(runs, START) > 0.2
    found = calibrate(runs, START, FIELDS)
    assert error(runs, found) < 0.02
    assert found.matmul_efficiency == pytest.approx(TRUE.matmul_efficiency, rel=0.1)
    assert found.step_seconds == pytest.approx(TRUE.step_seconds, rel=0.1)
    # No run has stages: what was known of them stays.
    assert found.overlap_stages == pytest.approx(TRUE.overlap_stages)


def test_a_run_that_went_wrong_moves_little(runs):
    slow = dataclasses.replace(runs[-1], seconds=30.0 * runs[-1].seconds)
    found = calibrate([*runs, slow], START, FIELDS)
    assert error(runs, found) < 0.05


def test_one_run_moves_what_was_known_by_no_more_than_it_tells(runs):
    one = dataclasses.replace(runs[-1], weight=1.0)
    found = calibrate([one], START, FIELDS)
    assert error([one], found) < error([one], START)
    # Bound by products: the host's share of it is in none of its seconds.
    assert found.kernel_seconds == pytest.approx(START.kernel_seconds, rel=0.3)


def test_memory_that_is_not_counted_is_a_share_of_what_passes_and_what_is_held():
    rows = [
        (lasting, passing, lasting + 2e9 + 1.3 * passing) for lasting in (1e9, 9e9) for passing in (2e9, 3e10)
    ]
    found = calibrate_memory([*rows, (1e9, 1e9, 5e11)], Framework())
    assert found.memory_overhead == pytest.approx(0.3, rel=0.05)
    assert found.reserved_bytes == pytest.approx(2e9, rel=0.1)
    # Never less than what is counted.
    less = calibrate_memory(
        [(lasting, passing, 0.9 * (lasting + passing)) for lasting, passing, _ in rows], Framework()
    )
    assert less.memory_overhead == less.reserved_bytes == 0.0


def test_the_usable_share_parts_what_ran_from_what_did_not():
    assert usable_memory([(0.5, True), (0.88, True), (0.93, False), (0.97, False)]) == pytest.approx(0.92)
