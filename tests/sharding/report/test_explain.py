"""What `explain` answers, from the search and from the compiler."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.sharding import Plan, declare, plan
from meshwright.sharding.cost.estimate import Estimate
from meshwright.sharding.errors import UserError
from meshwright.sharding.hlo.text import SourceLine
from meshwright.sharding.plans.origin import Alternative, is_bound
from meshwright.sharding.plans.proof import CompiledCollective, Finding, Proof

MIB = 2.0**20
PLANS = sorted((pathlib.Path(__file__).parents[3] / "configs" / "plans").glob("*.json"))


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
    items = "compute 300 ms, all_reduce/fsdp×tensor 199 ms, all_gather/fsdp 1 ms"
    assert f"compiled, a step takes 500 ms: {items}" in answer
    assert "compiled, a device holds 0.3 GiB at most" in answer
    told = [line for line in answer if line.startswith("found")]
    assert [line.split(",")[0] for line in told[:1]] == ["found: an all-reduce"]
    assert len(told) == 3


def test_without_a_proof_nothing_is_claimed(proved: Plan) -> None:
    bare = dataclasses.replace(proved, proof=None)
    for subject in (None, "fsdp", "mlp/up"):
        assert "compiled" not in bare.explain(subject)
        assert "found" not in bare.explain(subject)


@pytest.fixture(scope="module")
def shipped() -> Plan:
    (path,) = (path for path in PLANS if path.name == "llama3-8b.v5p-4x4x8.plan.json")
    return Plan.load(path)


def test_a_bound_is_not_told_as_a_time_to_be_had(shipped: Plan) -> None:
    answer = shipped.explain("tensor=8")
    (bound,) = [row for row in shipped.alternatives if row.mesh["tensor"] == 8]
    assert bound.estimate.peak_bytes > 2 * 95 * 2**30
    assert "at its best" not in answer
    assert "10.2 s is a lower bound on every layout with tensor=8, not an attainable time" in answer
    assert "does not fit, it needs 286.7 GiB of a device's 95.0 GiB" in answer
    assert bound.lost in answer


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_what_is_told_as_the_best_of_a_size_fits(path: pathlib.Path) -> None:
    planned = Plan.load(path)
    lines = [line for axis in planned.mesh for line in planned.explain(axis).splitlines()]
    rows = planned.alternatives
    for line in lines:
        if (size := re.match(r"not (\w+)=(\d+): (at its best|at its smallest|it|as far)", line)) is None:
            continue
        same = [row for row in rows if row.mesh.get(size[1], 1) == int(size[2])]
        best = min((row for row in same if row.fits), key=seconds_of, default=None)
        assert (best is not None) == (size[3] in ("at its best", "as far")), line
        if size[3] == "at its best":
            assert best is not None
            # Nothing that it was compared with bounds the size below it.
            assert all(seconds_of(row) >= seconds_of(best) for row in same if is_bound(row))
            assert f"; {best.estimate.step_seconds:.3g} s," in line


def seconds_of(row: Alternative) -> float:
    return row.estimate.step_seconds


def alternative(seconds: float, *, fits: bool, lost: str) -> Alternative:
    return Alternative(
        mesh={"data": 8, "tensor": 2},
        sharded={},
        storage="fsdp",
        remat="none",
        saved={},
        microbatches=1,
        estimate=Estimate(step_seconds=seconds, mfu=0.1, peak_bytes=200 * 2**30, time={}, memory={}),
        fits=fits,
        lost=lost,
    )


def test_the_fastest_that_fits_is_told_with_what_bounds_it(proved: Plan) -> None:
    slow = alternative(3.0, fits=True, lost="200% slower: host takes 2 s more")
    bound = alternative(2.0, fits=False, lost="at least 100% slower: host takes 1 s more")
    large = alternative(1.0, fits=False, lost="does not fit: 200.0 GiB of 95.0 GiB a device")
    layout = "data=8 x tensor=2, remat=none, microbatches=1, fsdp"
    for rows, words in (
        ((slow,), f"at its best ({layout}; 3 s, 200.0 GiB) it is 200% slower: host takes 2 s more"),
        ((slow, bound), f"as far as it was worked out ({layout}; 3 s, 200.0 GiB) it is 200% slower"),
        ((slow, bound), "no layout with data=8 takes less than 2 s"),
        ((bound, large), "it is at least 100% slower: host takes 1 s more; 2 s is a lower bound"),
        ((large,), f"at its smallest ({layout}; 1 s, 200.0 GiB) it does not fit"),
    ):
        assert words in dataclasses.replace(proved, alternatives=rows).explain("data=8")


def test_a_bound_of_the_search_is_known_from_what_a_plan_keeps() -> None:
    shapes = {"up": (8192, 32768), "down": (32768, 8192)}
    params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    batch = {"x": jax.ShapeDtypeStruct((2**20, 8192), "float32")}

    def deep(params: Any, batch: Any) -> Any:
        def layer(x: Any, _: Any) -> Any:
            return jax.nn.gelu(x @ params["up"]) @ params["down"], None

        x, _ = jax.lax.scan(layer, batch["x"], None, length=8)
        return jnp.mean(x**2)

    found = plan(deep, params, batch, topology="v5p:4x4x4", optimizer=optax.adamw(1e-3))
    assert found.search is not None
    answer = found.search.answer.found
    bounds = [one.estimate.step_seconds for one in answer.others if one.bound]
    assert bounds
    assert sorted(bounds) == sorted(seconds_of(row) for row in found.alternatives if is_bound(row))


def test_an_axis_that_a_declared_mesh_has_not_is_of_size_one() -> None:
    params = {"w": jax.ShapeDtypeStruct((64, 64), "float32")}
    batch = jax.ShapeDtypeStruct((16, 64), "float32")
    mine = declare(
        lambda p, x: jnp.mean((x @ p["w"]) ** 2), params, batch, topology="cpu:4", mesh={"fsdp": 4}
    )
    assert "tensor" not in mine.mesh
    assert mine.explain("tensor") == "tensor=1: nothing is sharded over tensor"
    assert mine.explain("tensor=2") == (
        "not tensor=2: the plan was declared with tensor=1 and compared with no other mesh; "
        "plan=auto mesh=null does so"
    )
    assert mine.explain("tensor=3") == "not tensor=3: it does not divide 4 devices"
    with pytest.raises(UserError, match="no axis, dimension or parameter"):
        mine.explain("tensr=2")
