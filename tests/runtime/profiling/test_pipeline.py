"""A pipeline's seconds by the scopes of its operations: what stages do, and what of it nobody waits for."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest
from meshwright.runtime.profiling.pipeline import pipeline_time
from meshwright.runtime.profiling.profile import Operation, Profile, StepTime
from meshwright.runtime.profiling.tables import report
from meshwright.sharding import Plan, declare
from meshwright.sharding.transform.pipeline.schedule import work_of


def loss(params: Any, x: Any) -> Any:
    return (jax.lax.scan(lambda x, w: (jax.numpy.tanh(x @ w), None), x, params["w"])[0] ** 2).mean()


def planned(**how: Any) -> Plan:
    params = {"w": jax.ShapeDtypeStruct((8, 16, 16), "float32")}
    x = jax.ShapeDtypeStruct((24, 16), "float32")
    names = {"w": ("layers", None, None)}
    how = {"topology": "cpu:4", "mesh": {"stage": 4}, "microbatches": 6, **how}
    return declare(loss, params, x, names=names, **how)


def operation(op_name: str, seconds: float) -> Operation:
    name = f"op{seconds}"
    words = {"kind": "compute", "opcode": "fusion", "source": None, "op_name": op_name}
    return Operation(name=name, count=1.0, seconds=seconds, share=0.0, **words)


def test_the_measured_bubble_is_what_layers_take_in_ticks_without_a_microbatch() -> None:
    plan = planned()
    operations = [
        operation("jit(step)/while/body/pipeline_forward/dot_general", 0.3),
        operation("jit(step)/while/body/transpose(jvp(pipeline_backward))/dot_general", 0.6),
        operation("jit(step)/while/body/pipeline_head/reduce", 0.2),
        operation("jit(step)/adam", 0.4),
    ]
    found = pipeline_time(operations, plan)
    assert found is not None
    assert found.seconds == pytest.approx({"forward": 0.3, "backward": 0.6, "head": 0.2})
    # Three of nine ticks each way.
    assert found.waits == pytest.approx(1 / 3)
    assert found.bubble_seconds == pytest.approx(0.3)
    assert plan.estimate is not None
    assert found.predicted_seconds == plan.estimate.time["bubble"]
    assert pipeline_time(operations[3:], plan) is None
    assert pipeline_time(operations, planned(mesh={"data": 4})) is None
    assert "33.3% of the layers' ticks" in printed(found)


def test_no_stage_waits_for_gradients_of_weights_that_are_delayed() -> None:
    seconds = {"forward": 0.3, "backward": 0.6, "weights": 0.3}
    operations = [operation(f"jit(step)/while/body/pipeline_{work}/dot", s) for work, s in seconds.items()]
    found = pipeline_time(operations, planned(schedule="delayed"))
    assert found is not None
    assert found.seconds == pytest.approx(seconds)
    assert found.bubble_seconds == pytest.approx((0.3 + 0.6) / 3)


def printed(found: Any) -> str:
    from rich.console import Console

    step = StepTime(
        step=0,
        device="cpu:0",
        wall_seconds=1.5,
        compute_seconds=1.5,
        collectives=(),
        data_wait_seconds=0.0,
        idle_seconds=0.0,
    )
    profile = Profile(
        platform="cpu",
        module="jit_step",
        mesh={},
        files=(),
        steps=(step,),
        host_steps=(),
        operations=(),
        notes=(),
        pipeline=found,
    )
    assert profile.to_dict()["pipeline"]["bubble_seconds"] == found.bubble_seconds
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report(dataclasses.replace(profile)))
    return capture.get()


@pytest.mark.devices(4)
@pytest.mark.numerics
def test_a_compiled_pipelines_products_say_what_they_are_of() -> None:
    plan = planned(interleave=2)
    shapes = ({"w": jax.ShapeDtypeStruct((8, 16, 16), "float32")}, jax.ShapeDtypeStruct((24, 16), "float32"))
    compiled = jax.jit(jax.grad(plan.apply(loss))).lower(*shapes).compile()
    lines = [line for line in compiled.as_text().splitlines() if "op_name=" in line]
    works = {work_of(line) for line in lines if " dot(" in line}
    assert works == {"forward", "backward"}
    assert {work_of(line) for line in lines if "collective-permute(" in line} == {"send"}
