"""What `explain` answers where the compiler has been asked."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.sharding import Plan, plan
from meshwright.sharding.hlo.text import SourceLine
from meshwright.sharding.plans.proof import CompiledCollective, Finding, Proof

MIB = 2.0**20


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((jax.nn.gelu(batch["x"] @ params["mlp"]["up"]) @ params["mlp"]["down"]) ** 2)


def collective(kind: str, *axes: str, seconds: float, exposed: float, count: int = 1) -> CompiledCollective:
    return CompiledCollective(
        kind=kind,
        axes=axes,
        count=count,
        bytes=count * 512 * MIB,
        wire_bytes=count * 512 * MIB,
        seconds=seconds,
        exposed_seconds=exposed,
        algorithm="",
        asynchronous=exposed < seconds,
    )


@pytest.fixture(scope="module")
def proved() -> Plan:
    params = {
        "mlp": {
            "up": jax.ShapeDtypeStruct((1024, 4096), "float32"),
            "down": jax.ShapeDtypeStruct((4096, 1024), "float32"),
        }
    }
    batch = {"x": jax.ShapeDtypeStruct((4096, 1024), "float32")}
    found = plan(
        loss,
        params,
        batch,
        topology="v5p:2x2x4",
        optimizer=optax.adamw(1e-3),
        mesh={"fsdp": 8, "tensor": 2, "data": 1},
    )
    proof = Proof(
        topology="v5p:2x2x4",
        versions={},
        peak_bytes=300 * MIB,
        step_seconds=0.5,
        compile_seconds=1.0,
        time={"compute": 0.3, "all_gather/fsdp": 0.001, "all_reduce/fsdp×tensor": 0.199},
        memory={"arguments": MIB},
        collectives=(
            collective("all_gather", "fsdp", seconds=0.02, exposed=0.001, count=3),
            collective("all_gather", "fsdp", seconds=0.01, exposed=0.0),
            collective("all_reduce", "fsdp", "tensor", seconds=0.2, exposed=0.199),
        ),
        findings=(
            Finding(kind="padding_waste", what="padding", remedy="", bytes=MIB),
            Finding(
                kind="parameter_kept_whole",
                what="params['mlp']['up'] is whole on every device",
                remedy="shard it",
                bytes=16 * MIB,
                source=SourceLine(file="model.py", line=7),
            ),
            Finding(kind="overlaps_nothing", what="an all-reduce", remedy="", seconds=0.199),
        ),
    )
    return dataclasses.replace(found, proof=proof)


def test_an_axis_names_what_the_compiled_step_runs_over_it(proved: Plan) -> None:
    answer = proved.explain("fsdp").splitlines()
    assert (
        "compiled: all_reduce/fsdp×tensor 1 times, 0.5 GiB in 200 ms, "
        "all_gather/fsdp 4 times, 2.0 GiB in 30 ms; computing waits for 200 ms of it, of a step of 500 ms"
    ) in answer
    told = next(line for line in proved.explain("tensor").splitlines() if line.startswith("compiled"))
    assert "all_reduce/fsdp×tensor" in told
    assert "all_gather" not in told


def test_an_axis_that_nothing_runs_over_is_said_to_be_free(proved: Plan) -> None:
    assert proved.proof is not None
    quiet = dataclasses.replace(proved, proof=dataclasses.replace(proved.proof, collectives=()))
    assert "compiled: no collective runs over tensor" in quiet.explain("tensor").splitlines()
    # One device talks to nobody: there is nothing to tell.
    assert "compiled" not in proved.explain("data")


def test_a_parameter_tells_what_was_found_of_it_alone(proved: Plan) -> None:
    found = "found: params['mlp']['up'] is whole on every device (model.py:7), 16.0 MiB; shard it"
    assert proved.explain("mlp/up").splitlines()[1:] == [found]
    assert proved.explain("mlp/down").splitlines()[1:] == []


def test_the_whole_plan_tells_compiled_figures_and_the_costliest_findings(proved: Plan) -> None:
    answer = proved.explain().splitlines()
    assert "compiled, a step takes 500 ms: compute 300 ms, all_reduce/fsdp×tensor 199 ms" in answer
    assert "compiled, a device holds 0.3 GiB at most" in answer
    told = [line for line in answer if line.startswith("found")]
    assert [line.split(",")[0] for line in told[:1]] == ["found: an all-reduce"]
    assert len(told) == 3


def test_without_a_proof_nothing_is_claimed(proved: Plan) -> None:
    bare = dataclasses.replace(proved, proof=None)
    for subject in (None, "fsdp", "mlp/up"):
        assert "compiled" not in bare.explain(subject)
        assert "found" not in bare.explain(subject)
