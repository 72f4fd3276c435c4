"""The search against brute force, and what it says of what lost."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import zoo
from meshwright.sharding import Topology
from meshwright.sharding.cost import Estimate, Pricer
from meshwright.sharding.cost.candidate import Candidate
from meshwright.sharding.cost.profile import profile
from meshwright.sharding.planner.choices.microbatches import PartsProof
from meshwright.sharding.planner.choices.remat import ladders
from meshwright.sharding.planner.declared import Declared
from meshwright.sharding.planner.inputs import Problem
from meshwright.sharding.planner.outcome import best_of
from meshwright.sharding.planner.search import search
from meshwright.sharding.planner.space import Space, space
from meshwright.sharding.program import trace


def problem(name: str, topology: str, **declared: Any) -> tuple[Space, Pricer]:
    case = zoo.MODELS[name]()
    program = trace(case.loss, *case.shapes())
    where = Topology.parse(topology)
    tables = profile(program)
    # Simulated devices have no link to a host.
    offered = ladders(tables, host=not where.chip.nominal)
    proof = PartsProof(program=program, args=case.shapes())
    return space(program, where, Declared(**declared), proof=proof, ladders=offered), Pricer(tables, where)


def layout_of(candidate: Candidate) -> Any:
    way = candidate.schedule, candidate.interleave, candidate.stage_remat
    return dict(candidate.mesh), dict(candidate.dims), dict(candidate.stored), dict(candidate.optimizer), way


@pytest.mark.parametrize(
    ("name", "topology", "mesh"),
    [
        ("state_space", "v5e:2x2", {}),
        ("lstm", "h100:4", {}),
        ("mlp", "cpu:8", {}),
        ("state_space", "2*v5e:1x1", {}),
        ("state_space", "h100:4", {"stage": 2}),
    ],
)
def test_it_finds_what_brute_force_finds(name: str, topology: str, mesh: dict[str, int]) -> None:
    offered, pricer = problem(name, topology, mesh=mesh)
    priced = [(candidate, pricer.price(candidate)) for candidate in offered.candidates()]
    sizes = sorted(estimate.needed_bytes for _, estimate in priced)
    for share in (0.0, 0.05, 0.3, 0.7, 1.0):
        capacity = sizes[int(share * (len(sizes) - 1))]
        fitting = [
            (estimate.step_seconds, candidate)
            for candidate, estimate in priced
            if estimate.needed_bytes <= capacity
        ]
        found = search(
            offered,
            pricer.price,
            capacity,
            size=pricer.needed_bytes,
            least=pricer.least,
            floor=pricer.least_bytes,
            runners_up=3,
            each_size=False,
        )
        assert found.best is not None
        assert found.best.estimate.step_seconds == min(seconds for seconds, _ in fitting)
        # Runners-up are the best of other layouts, in order.
        best_of: list[tuple[Any, float]] = []
        for seconds, candidate in sorted(fitting, key=lambda row: row[0]):
            if layout_of(candidate) not in [layout for layout, _ in best_of]:
                best_of.append((layout_of(candidate), seconds))
        got = [found.best, *found.others]
        assert [one.estimate.step_seconds for one in got] == [seconds for _, seconds in best_of[: len(got)]]
        assert len(got) == min(4, len(best_of))
        assert found.priced <= len(priced)
        # What takes as long as that is not looked for.
        best = found.best.estimate.step_seconds
        assert search(offered, pricer.price, capacity, size=pricer.needed_bytes, below=best).best is None


@pytest.mark.parametrize(
    ("name", "topology", "mesh"),
    [("state_space", "v5e:2x4", {}), ("state_space", "h100:8", {"stage": 2})],
)
def test_what_a_layout_takes_at_least_changes_nothing_but_what_is_measured(
    name: str, topology: str, mesh: dict[str, int]
) -> None:
    offered, pricer = problem(name, topology, mesh=mesh)
    for candidate in offered.candidates():
        assert 0 < pricer.least_bytes(candidate) <= pricer.needed_bytes(candidate)
    sizes = sorted(pricer.needed_bytes(candidate) for candidate in offered.candidates())
    measured = []
    for capacity in (sizes[0] / 2, sizes[len(sizes) // 20], sizes[len(sizes) // 4]):
        asked = {"size": pricer.needed_bytes, "least": pricer.least}
        without = search(offered, pricer.price, capacity, **asked)
        found = search(offered, pricer.price, capacity, **asked, floor=pricer.least_bytes)
        assert [layout_of(one.candidate) for one in found.misfits] == [
            layout_of(one.candidate) for one in without.misfits
        ]
        assert dataclasses.replace(found, priced=0) == dataclasses.replace(without, priced=0)
        measured.append((found.priced, without.priced))
    assert all(fewer <= all_ for fewer, all_ in measured)
    assert any(fewer < all_ for fewer, all_ in measured)


def test_it_says_what_does_not_fit_and_by_how_much() -> None:
    offered, pricer = problem("state_space", "v5e:2x2")
    smallest = min(pricer.price(candidate).needed_bytes for candidate in offered.candidates())
    found = search(offered, pricer.price, smallest - 1)
    assert found.best is None
    assert found.others == ()
    assert found.misfits[0].estimate.needed_bytes == smallest


def test_what_fits_in_one_microbatch_alone_is_found() -> None:
    """Where a microbatch's gradients lie beside their sum, one microbatch may take less than many."""
    offered, pricer = problem("state_space", "h100:4")

    def price(candidate: Candidate) -> Estimate:
        least = candidate.microbatches == 1 and candidate.remat == "full"
        return dataclasses.replace(pricer.price(candidate), peak_bytes=1.0 if least else 2.0)

    assert any(candidate.microbatches > 1 for candidate in offered.candidates())
    found = search(offered, price, 1.0)
    assert found.best is not None
    assert (found.best.candidate.microbatches, found.best.candidate.remat) == (1, "full")


def test_every_size_of_every_axis_is_accounted_for() -> None:
    offered, pricer = problem("encoder_decoder", "v5e:2x4")
    found = search(offered, pricer.price, 16e9, runners_up=2)
    assert found.best is not None
    sizes = {place for one in (found.best, *found.others) for place in one.candidate.mesh.items()}
    assert sizes == {place for layout in offered.layouts for place in layout.mesh.items()}
    for one in found.others:
        assert one.estimate.step_seconds >= found.best.estimate.step_seconds


def test_what_is_stored_may_decide_before_time() -> None:
    offered, pricer = problem("mlp", "cpu:8")

    def stored(layout: Candidate) -> float:
        return float(layout.mesh["data"])

    found = search(offered, pricer.price, 16e9, stored=stored)
    assert found.best is not None
    assert found.best.candidate.mesh["data"] == 1
    alone = [pricer.price(c).step_seconds for c in offered.candidates() if c.mesh["data"] == 1]
    assert found.best.estimate.step_seconds == min(alone)


def test_only_a_part_of_the_space_is_priced() -> None:
    offered, _ = problem("state_space", "v5e:2x4")
    asked = itertools.count()

    def price(candidate: Candidate) -> Estimate:
        next(asked)
        seconds = 1.0 + candidate.mesh["tensor"] + candidate.microbatches + len(candidate.remat)
        return Estimate(step_seconds=seconds, mfu=0.5, peak_bytes=1.0, time={}, memory={})

    found = search(offered, price, 2.0, each_size=False)
    assert found.best is not None
    assert next(asked) < 0.4 * sum(1 for _ in offered.candidates())


def test_what_fits_nowhere_is_priced_only_to_be_told_of() -> None:
    offered, pricer = problem("state_space", "h100:8")
    smallest: dict[int, float] = {}
    for candidate in offered.candidates():
        layout = next(n for n, one in enumerate(offered.layouts) if layout_of(one) == layout_of(candidate))
        smallest[layout] = min(smallest.get(layout, math.inf), pricer.needed_bytes(candidate))
    capacity = sorted(smallest.values())[len(smallest) // 4]
    priced: list[Candidate] = []

    def price(candidate: Candidate) -> Estimate:
        priced.append(candidate)
        return pricer.price(candidate)

    found = search(offered, price, capacity, size=pricer.needed_bytes, least=pricer.least, each_size=False)
    told = [layout_of(one.candidate) for one in found.misfits]
    hopeless = [layout_of(one) for n, one in enumerate(offered.layouts) if smallest[n] > capacity]
    assert 0 < len(told) < len(hopeless)
    assert all(one in hopeless for one in told)
    assert all(layout_of(one) in told for one in priced if layout_of(one) in hopeless)


def test_what_a_search_found_of_placements_goes_when_it_is_done() -> None:
    case = zoo.MODELS["mlp"]()
    params, batch = case.shapes()
    given = Problem(loss=case.loss, params=params, batch=batch, optimizer=None, names=None)
    made, again = (best_of(given, Topology.parse("v5e:2x2"), Declared()) for _ in range(2))
    assert not given.findings
    assert made[0].estimate == again[0].estimate
