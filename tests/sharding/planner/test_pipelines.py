"""Stages in the search: taken where they are fastest by their own price, or fit at last, and run."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.sharding import Plan, Topology, UserError, plan
from meshwright.sharding.cost.pipeline import held_at_least
from meshwright.sharding.ops.experts import experts
from meshwright.sharding.planner.declared import Declared
from meshwright.sharding.planner.inputs import Problem
from meshwright.sharding.planner.pipelines import _Work
from meshwright.sharding.planner.search import search

WIDTH, TIME = 4096, 16
# Slices of four devices: between them a gradient of all layers takes longer than what stages hand on.
SLOW = "4*v5e:2x2"


def problem_of(rows=256, layers=16, width=WIDTH, time=TIME, passes=1):
    shape = jax.ShapeDtypeStruct
    params = {
        "blocks": {
            "up": shape((layers, width, 4 * width), "float32"),
            "down": shape((layers, 4 * width, width), "float32"),
        },
        "out": shape((width,), "float32"),
    }

    def loss(params, batch):
        def block(x, w):
            h = jax.nn.silu(x @ w["up"].astype(x.dtype))
            return x + h @ w["down"].astype(x.dtype), None

        x, _ = jax.lax.scan(block, batch["x"], params["blocks"])
        found = x.astype(jnp.float32) @ params["out"]
        if passes == 2:
            # What is known of a row waits for all rows.
            found = found - (found**2).mean()
        return (found**2).mean()

    return loss, params, {"x": shape((rows, time, width), "bfloat16")}


def planned(topology, *args, **more):
    return plan(*args, topology=topology, optimizer=optax.adamw(1e-3), **more)


def test_stages_are_taken_over_slow_links_and_are_the_best_of_all_sizes():
    args = problem_of()
    found = planned(SLOW, *args)
    each = {size: planned(SLOW, *args, mesh={"stage": size}) for size in (1, 2, 4, 8, 16)}
    seconds = {size: one.estimate.step_seconds for size, one in each.items()}
    best = min(seconds, key=lambda size: seconds[size])
    assert best > 1
    assert found.mesh["stage"] == best
    assert found.estimate.step_seconds == seconds[best] < 0.5 * seconds[1]
    # What it was preferred to stands beside it.
    assert any(one.mesh.get("stage", 1) == 1 for one in found.alternatives)


def test_stages_are_not_taken_where_links_are_fast():
    assert planned("v5e:4x4", *problem_of()).mesh.get("stage", 1) == 1


def test_stages_are_taken_where_nothing_else_fits():
    args = problem_of(rows=1024, layers=32, width=8192, time=32)
    with pytest.raises(UserError, match="nothing fits"):
        planned("8*v5e:2x2", *args, mesh={"stage": 1})
    assert planned("8*v5e:2x2", *args).mesh["stage"] > 1


def test_stages_are_not_taken_where_the_loss_does_not_go_through_them():
    assert planned(SLOW, *problem_of(passes=2)).mesh.get("stage", 1) == 1


def test_rows_that_not_all_stages_share_out_are_shared_by_fewer_at_their_price():
    found = planned(SLOW, *problem_of(rows=24), mesh={"stage": 16})
    rows = 24 // found.microbatches
    said = f"of stage=16 {math.gcd(rows, 16)} share out the {rows} rows that a microbatch has on a device"
    assert any(note.startswith(said) for note in found.notes)
    # What is before and behind the layers is worked by 8 of 16, and longer for it.
    few = planned(SLOW, *problem_of(rows=8), mesh={"stage": 16}, microbatches=1)
    all_ = planned(SLOW, *problem_of(rows=16), mesh={"stage": 16}, microbatches=1)
    assert few.estimate.step_seconds > 0.5 * all_.estimate.step_seconds
    assert any(note.endswith("nearest that all share: 16 rows") for note in few.notes)
    assert not any("share out the" in note for note in all_.notes)


def space_of(where, *args, **declared):
    loss, params, batch = args
    problem = Problem(loss=loss, params=params, batch=batch, optimizer=optax.adamw(1e-3), names=None)
    topology, given = Topology.parse(where), Declared(mesh={"stage": 4}, **declared)
    return problem.pricer(topology, given), problem.space(topology, given)


def way_of(candidate):
    return candidate.schedule, candidate.interleave, candidate.stage_remat


@pytest.mark.parametrize(
    ("where", "sizes"),
    [
        ("4*v5e:1x1", {"rows": 64, "layers": 8, "width": 1024, "time": 64}),
        ("v5p:2x2x1", {"rows": 16, "layers": 8, "width": 16384, "time": 512}),
    ],
)
def test_of_all_ways_to_work_stages_the_fastest_that_fits_is_found(where, sizes):
    pricer, space = space_of(where, *problem_of(**sizes))
    priced = [(pricer.price(one), one) for one in space.candidates()]
    every = {(schedule, again) for schedule in ("1f1b", "delayed") for again in (True, False)}
    assert {(one.schedule, one.stage_remat) for one in space.layouts} == every
    # Neither all that gradients read goes over ticks, nor what goes to the host.
    over_ticks = [one for _, one in priced if not one.stage_remat]
    assert all(one.remat != "none" and "host" not in one.saved.values() for one in over_ticks)
    needed, taken = sorted(estimate.needed_bytes for estimate, _ in priced), set()
    for share in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0):
        capacity = needed[int(share * (len(needed) - 1))]
        wanted = min(one.step_seconds for one, _ in priced if one.needed_bytes <= capacity)
        how = {"size": pricer.needed_bytes, "least": pricer.least, "each_size": False}
        found = search(space, pricer.price, capacity, **how).best
        assert found.estimate.step_seconds == wanted
        taken.add(way_of(found.candidate))
    # More memory pays for what is kept, and then for what is delayed.
    assert len(taken) > 1


def test_ways_that_stages_may_work_are_those_that_are_declared():
    args = problem_of(rows=16, layers=8, width=1024, time=64)
    for schedule, again in itertools.product(("1f1b", "delayed"), (True, False)):
        _, space = space_of("v5p:2x2x1", *args, schedule=schedule, stage_remat=again, interleave=2)
        assert {way_of(one) for one in space.layouts} == {(schedule, 2, again)}
    _, space = space_of("v5p:2x2x1", *args, remat="none")
    assert all(one.stage_remat for one in space.layouts)


def test_a_plan_says_how_its_stages_work_and_what_other_ways_would_take():
    args, mesh = problem_of(rows=64, layers=8, width=2048, time=256), {"stage": 4}
    found = planned("4*v5e:1x1", *args, mesh=mesh)
    (note,) = [note for note in found.notes if note.startswith("stages work in 1f1b, kept over ticks: ")]
    again = planned("4*v5e:1x1", *args, mesh=mesh, stage_remat=True)
    assert again.schedule == "1f1b"
    longer = again.estimate.step_seconds / found.estimate.step_seconds - 1
    assert longer > 0.1
    assert f"1f1b, run again would take {again.estimate.step_seconds * 1e3:.3g} ms, {longer:+.1%}" in note
    (row, *_) = [row for row in found.alternatives if row.way == again.way]
    assert row.estimate.step_seconds == again.estimate.step_seconds
    for asked, words in (
        ("stage_remat=true", f"it is {longer:.0%} slower: "),
        ("schedule=delayed", "1f1b with weights' gradients delayed, kept over ticks"),
        ("interleave=2", "1f1b of 2 chunks a stage, kept over ticks"),
        ("interleave=8", "1f1b of 8 chunks a stage, kept over ticks"),
    ):
        answer = found.explain(asked)
        assert answer.startswith(f"not {asked}: ")
        assert words in answer
    assert found.explain("schedule=1f1b") == found.explain("stage_remat") == note
    read = Plan.from_dict(json.loads(json.dumps(found.to_dict())))
    assert read.alternatives == found.alternatives
    assert f"it is {longer:.0%} slower: " in read.explain("stage_remat=true")
    assert "does not remember" in read.explain("interleave=8")
    with pytest.raises(UserError, match="schedule='zigzag' is unknown"):
        found.explain("schedule=zigzag")
    with pytest.raises(UserError, match="the plan has none; ask about stage=2"):
        planned("4*v5e:1x1", *args, mesh={"stage": 1}).explain("schedule=delayed")


def test_libtpu_is_given_no_passes_in_two_beside_tensor():
    args = problem_of(rows=16, layers=8, width=1024, time=64)
    for where, ways in (
        ("v5p:2x2x2", {("1f1b", True)}),
        ("h100:8", set(itertools.product(("1f1b", "delayed"), (True, False)))),
    ):
        loss, params, batch = args
        problem = Problem(loss=loss, params=params, batch=batch, optimizer=optax.adamw(1e-3), names=None)
        space = problem.space(Topology.parse(where), Declared(mesh={"stage": 4, "tensor": 2}))
        assert {(one.schedule, one.stage_remat) for one in space.layouts} == ways
    made = planned("v5p:2x2x2", *args, mesh={"stage": 4, "tensor": 2})
    reason = "libtpu ends itself on what stages keep over ticks, and on delayed gradients, beside tensor=2"
    assert f"stages work in 1f1b, run again: {reason}" in made.notes
    assert made.explain("schedule=delayed") == f"not schedule=delayed: {reason}"


def test_no_layout_is_cheaper_than_its_bounds():
    pricer, space = space_of(SLOW, *problem_of())
    assert len(space.layouts) > 10
    work = _Work.of(pricer, 16, 256, keeps=True)
    for layout in space.layouts:
        most = dataclasses.replace(layout, microbatches=space.parts(layout)[-1])
        seconds = pricer.least(most)
        # What is exchanged comes on top of computing, which takes no less than shared out evenly.
        assert work.over(4, most.interleave, most.microbatches) + pricer.exchanged(most) <= seconds
        size = held_at_least(pricer.profile, most, pricer.slot_bytes)
        ladder, *_ = space.ladders(layout)
        for remat in (space.remats[ladder[0]], space.remats[ladder[-1]]):
            for count in space.parts(layout):
                one = pricer.price(remat.on(layout, count))
                assert one.step_seconds >= seconds * 0.995
                assert one.peak_bytes >= size


def mixture_of(layers=32, width=2048, count=8, rows=1024, time=64):
    shape = jax.ShapeDtypeStruct
    params = {
        "router": shape((layers, width, count), "float32"),
        "up": shape((layers, count, width, 2 * width), "float32"),
        "down": shape((layers, count, 2 * width, width), "float32"),
    }

    def loss(params, batch):
        def block(x, w):
            scores = jax.nn.softmax(x.astype(jnp.float32) @ w["router"])
            weights, chosen = jax.lax.top_k(scores, 2)
            up, down = w["up"].astype(x.dtype), w["down"].astype(x.dtype)
            return x + experts(x, weights, chosen, up=up, down=down, activation="gelu"), None

        x, _ = jax.lax.scan(block, batch["x"], params)
        return (x.astype(jnp.float32) ** 2).mean()

    return loss, params, {"x": shape((rows, time, width), "bfloat16")}


@pytest.mark.slow
def test_a_mixture_takes_stages_by_the_same_rule():
    args = mixture_of()
    found = planned("8*v5e:2x2", *args)
    assert found.mesh["stage"] == 8
    without = planned("8*v5e:2x2", *args, mesh={"stage": 1})
    assert found.estimate.step_seconds < 0.9 * without.estimate.step_seconds
    # Tokens go to their experts and back forward, backward, and where a stage runs its layers again.
    assert found.mesh["expert"] == 4
    assert found.params["up"].spec[:2] == ("stage", "expert")
    kept = planned("8*v5e:2x2", *args, mesh={"stage": 1, "expert": 4}, remat="none").estimate.time
    again = planned("8*v5e:2x2", *args, mesh={"stage": 8}, stage_remat=True).estimate
    assert again.time["all_to_all/expert"] == pytest.approx(1.5 * kept["all_to_all/expert"], rel=0.01)
    assert found.estimate.step_seconds <= again.step_seconds


def test_a_dense_mixture_is_not_cut_by_what_cuts_the_rows_of_stages():
    """Of experts in a product of all of them, none gets tokens by itself."""
    _, params, batch = mixture_of()

    def loss(params, batch):
        def block(x, w):
            shares = jax.nn.softmax(x @ w["router"].astype(x.dtype))
            hidden = jnp.einsum("bte,xef->bxtf", x, w["up"].astype(x.dtype))
            return x + jnp.einsum("btx,bxtf,xfe->bte", shares, hidden, w["down"].astype(x.dtype)), None

        x, _ = jax.lax.scan(block, batch["x"], params)
        return (x.astype(jnp.float32) ** 2).mean()

    names = {
        "router": (None, None, None),
        "up": (None, "experts", None, None),
        "down": (None, "experts", None, None),
    }
    declared = {"mesh": {"stage": 8, "expert": 4}, "rules": {"experts": "expert"}, "names": names}
    with pytest.raises(
        UserError, match="expert=4 cuts the batch and experts, and stages take the batch apart"
    ):
        planned("8*v5e:2x2", loss, params, batch, **declared)
