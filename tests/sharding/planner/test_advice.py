"""What is said when nothing fits is true: by how much, and what would."""

from __future__ import annotations

import re
from typing import Any

import jax
import pytest
from meshwright.sharding import Topology, UserError, plan
from meshwright.sharding.planner.declared import Declared
from meshwright.sharding.planner.inputs import Problem


def loss(params: Any, batch: Any) -> jax.Array:
    return ((batch["x"] @ params["up"]) ** 2).mean()


def planned(
    topology: str, *, rows: int = 4096, columns: int = 4096, batch: int = 4096, **declared: Any
) -> Any:
    params = {"up": jax.ShapeDtypeStruct((rows, columns), "float32")}
    return plan(
        loss,
        params,
        {"x": jax.ShapeDtypeStruct((batch, rows), "float32")},
        topology=topology,
        **declared,
    )


def refusal(topology: str, **what: Any) -> str:
    with pytest.raises(UserError, match=f"nothing fits {re.escape(topology)}: ") as caught:
        planned(topology, **what)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("topology", "size"), [("v5e:2x2", 2**16), ("v5e:16x16", 7 * 2**16), ("h100:8", 2**18)]
)
def test_the_smallest_slice_that_fits_is_named(topology: str, size: int) -> None:
    said = refusal(topology, rows=size, columns=size)
    named = re.search(r"what fits: ([^ ,]+)", said)
    assert named, said
    assert planned(named[1], rows=size, columns=size).estimate.peak_bytes > 0
    slices, _, shape = named[1].rpartition("*")
    if slices and slices != "2":
        refusal(f"{int(slices) // 2}*{shape}", rows=size, columns=size)


def test_one_device_is_planned_for() -> None:
    made = planned("v5e:1x1")
    assert set(made.mesh.values()) == {1}
    assert "what fits: v5e:2x2" in refusal("v5e:1x1", rows=2**15, columns=2**15)


def test_a_batch_that_is_too_large_in_one_part() -> None:
    said = refusal("v5e:1x1", batch=2**19, microbatches=1)
    found = re.search(r"what fits: microbatches left to the plan, .* a batch of (\d+) rows", said)
    assert found, said
    planned("v5e:1x1", batch=int(found[1]), microbatches=1)
    refusal("v5e:1x1", batch=2 * int(found[1]), microbatches=1)
    assert planned("v5e:1x1", batch=2**19).microbatches > 1


def test_a_declared_part_that_stands_in_the_way_is_named() -> None:
    large = {"rows": 2**16, "columns": 2**16}
    for part, declared in {"mesh": {"data": 16}, "rules": {"*": None}}.items():
        assert f"what fits: {part} left to the plan" in refusal("v5e:4x4", **large, **{part: declared})
    planned("v5e:4x4", **large)


def test_a_loss_is_not_traced_again_for_batches_that_cannot_fit() -> None:
    traced: list[int] = []

    def counting(params: Any, batch: Any) -> jax.Array:
        traced.append(batch["x"].shape[0])
        return loss(params, batch)

    params = {"up": jax.ShapeDtypeStruct((2**16, 2**18), "float32")}
    batch = {"x": jax.ShapeDtypeStruct((2**12, 2**16), "float32")}
    with pytest.raises(UserError, match="nothing fits"):
        plan(counting, params, batch, topology="v5e:2x2")
    assert set(traced) == {2**12}


def test_one_proof_of_many_parts_is_one_of_the_fewer() -> None:
    problem = Problem(
        loss=loss,
        params={"up": jax.ShapeDtypeStruct((4096, 4096), "float32")},
        batch={"x": jax.ShapeDtypeStruct((4096, 4096), "float32")},
        optimizer=None,
        names=None,
    )
    found = problem.space(Topology.parse("v5e:4x4"), Declared())
    assert len({parts for each in found.microbatches.values() for parts in each}) > 8
    assert list(problem.proved) == [4096]
