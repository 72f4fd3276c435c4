"""Products by the schedule of the real compiler: between what matrix units need and what it estimated."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from compiled_programs import LARGE, Compiled, texts
from meshwright.sharding import Topology, plan
from meshwright.sharding.compiled.schedule import scheduled_cycles
from meshwright.sharding.cost.calibration import calibration_for
from meshwright.sharding.hlo.text import parse_hlo
from meshwright.sharding.verify.verify import verify
from meshwright.sharding.xla.options import trials_for
from meshwright.sharding.xla.targets import missing

CASES = {"v5p:2x2x1": "fsdp=4", "v5e:2x2": "fsdp=4", "v6e:2x2": "fsdp=4"}
TOPOLOGIES = [pytest.param(one, marks=() if one == "v6e:2x2" else pytest.mark.slow) for one in CASES]


def _compiled(topology: str) -> Compiled:
    reason = missing(Topology.parse(topology))
    if reason is not None:
        pytest.skip(reason)
    return texts(f"{topology}/{CASES[topology]}/product", schedules=True)[f"{topology}/product"]


def _seconds(found: Compiled, bundles: dict[str, int], product_cycles: float = 1.0) -> float:
    record = calibration_for(Topology.parse(found.topology).chip.name)
    record = dataclasses.replace(record, product_cycles=product_cycles)
    return found.proof(calibration=record, bundles=bundles).time["compute"]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_product_takes_as_long_as_its_schedule(topology):
    found = _compiled(topology)
    chip = Topology.parse(topology).chip
    assert found.bundles
    needed = 2 * LARGE**3 / chip.peak_flops("bfloat16")
    estimated, scheduled = _seconds(found, {}), _seconds(found, found.bundles)
    assert needed <= scheduled <= estimated
    if topology == "v6e:2x2":  # where the estimate is further from what was measured of such products
        assert scheduled < 0.95 * estimated
    # One that is longer than estimated changes nothing, an empty one leaves what the matrix units need.
    long = dict.fromkeys(found.bundles, 10**9)
    short = dict.fromkeys(found.bundles, 0)
    assert _seconds(found, long) == estimated
    assert needed <= _seconds(found, short) <= scheduled


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_without_a_schedule_a_product_takes_what_schedules_do_on_its_chip(topology):
    found = _compiled(topology)
    needed = 2 * LARGE**3 / Topology.parse(topology).chip.peak_flops("bfloat16")
    whole, share = _seconds(found, {}), _seconds(found, {}, product_cycles=0.95)
    assert share == pytest.approx(max(0.95 * whole, needed), rel=0.01)
    assert needed <= _seconds(found, {}, product_cycles=0.01) <= share
    assert _seconds(found, found.bundles, product_cycles=0.95) == _seconds(found, found.bundles)


def test_products_with_the_windows_of_a_plans_options_take_what_was_estimated():
    found = _compiled("v6e:2x2")
    loss = jax.jit(lambda params, batch: jnp.mean((batch @ params) ** 2))
    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    made = plan(loss, shape, shape, topology="v6e:2x2", optimizer=optax.sgd(0.1))
    (trial,) = [trial for trial in trials_for(Topology.parse("v6e:2x2")) if trial.name == "scoped_vmem"]
    plain, wide = (
        found.proof(planned=dataclasses.replace(made, compiler_options=options)).time["compute"]
        for options in ({}, trial.options)
    )
    usual = calibration_for("v6e").product_cycles
    assert usual < 1.0
    assert plain == _seconds(found, {}, product_cycles=usual)
    assert wide == _seconds(found, {}, product_cycles=1.0) > plain


@pytest.mark.slow
def test_both_cores_of_a_megacore_share_the_windows():
    found = _compiled("v5p:2x2x1")
    program = parse_hlo(found.text)
    chip = Topology.parse("v5p:2x2x1").chip
    cycles = [
        cycles
        for instruction in program.instructions.values()
        if (cycles := scheduled_cycles(instruction, found.bundles, chip)) is not None
    ]
    # Eight matrix units of 128 x 128 in two cores; a schedule may wait for them, but not for twice as long.
    needed = LARGE**3 / (8 * 128 * 128)
    assert 0.5 * needed < sum(cycles) < 1.5 * needed


@pytest.mark.slow
def test_a_plan_is_verified_by_schedules_where_they_are_asked_for(tmp_path, monkeypatch):
    topology = "v5e:2x2"  # Whose machine code takes least to make.
    if (reason := missing(Topology.parse(topology))) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def loss(params, batch):
        return jnp.mean(jnp.square((batch["x"] @ params["w"]).astype(jnp.float32)))

    params = {"w": jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16)}
    batch = {"x": jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16)}
    made = plan(loss, params, batch, topology=topology, mesh={"fsdp": 4}, optimizer=optax.sgd(1e-3))
    estimated, scheduled = (
        verify(made, loss, params, batch, optax.sgd(1e-3), **how).proof.time["compute"]
        for how in ({"quick": True}, {"schedules": True})
    )
    needed = 2048**3 / Topology.parse(topology).chip.peak_flops("bfloat16")
    assert needed < min(scheduled, estimated)
    assert scheduled != estimated
