"""Time and memory of a plan, estimated alone and beside what the compiler says."""

from __future__ import annotations

import pytest
from meshwright.sharding.plans.estimate import Estimate
from meshwright.sharding.plans.proof import Proof
from meshwright.sharding.report.costs import cost_figures, memory_chapter, time_chapter
from meshwright.sharding.report.document import Bars, Chapter, Drawing, Text

GIB = 2.0**30
ESTIMATE = Estimate(
    step_seconds=2.0,
    mfu=0.5,
    peak_bytes=40 * GIB,
    time={"compute/matmul": 1.5, "optimizer": 0.1, "all_gather/fsdp": 0.3, "offload/host": 0.1},
    memory={"params": 10 * GIB, "temporaries": 30 * GIB},
    heap_bytes=44 * GIB,
)
PROOF = Proof(
    topology="v5p:2x2x1",
    versions={"jaxlib": "0.10.2"},
    peak_bytes=60 * GIB,
    step_seconds=1.0,
    compile_seconds=12.3,
    time={"compute": 0.8, "all_gather/fsdp": 0.2},
    memory={"arguments": 12 * GIB},
)


def rows(chapter: Chapter) -> list[tuple[str, ...]]:
    """Return names, as far in as they stand, and figures of a chapter's bars."""
    return [
        (" " * bar.depth + bar.name, *bar.figures)
        for block in chapter.blocks
        if isinstance(block, Bars)
        for bar in block.bars
    ]


def test_an_estimate_alone_is_told_in_shares() -> None:
    chapter = time_chapter(ESTIMATE, None)
    assert rows(chapter) == [
        ("compute/matmul", "1.5 s", "75.0%"),
        ("all_gather/fsdp", "300 ms", "15.0%"),
        ("optimizer", "100 ms", "5.0%"),
        ("offload/host", "100 ms", "5.0%"),
    ]
    (block,) = chapter.blocks
    assert isinstance(block, Bars)
    assert [bar.tracks[0][0].kind for bar in block.bars] == ["compute", "talk", "compute", "talk"]
    assert rows(memory_chapter(ESTIMATE, None, None)) == [
        ("temporaries", "30.0 GiB", "75.0%"),
        ("params", "10.0 GiB", "25.0%"),
    ]


def test_beside_a_proof_the_estimate_is_taken_apart_below_the_sums() -> None:
    assert rows(time_chapter(ESTIMATE, PROOF)) == [
        ("compute", "1.6 s", "800 ms", "-50.0%"),
        (" compute/matmul", "1.5 s", "", ""),
        (" optimizer", "100 ms", "", ""),
        ("all_gather/fsdp", "300 ms", "200 ms", "-33.3%"),
        ("host", "100 ms", "0", "-100.0%"),
        (" offload/host", "100 ms", "", ""),
    ]
    assert rows(memory_chapter(ESTIMATE, PROOF, None)) == [
        ("parameters, moments, batch", "10.0 GiB", "12.0 GiB", "+20.0%"),
        (" params", "10.0 GiB", "", ""),
        ("besides, at the peak", "30.0 GiB", "48.0 GiB", "+60.0%"),
        (" temporaries", "30.0 GiB", "", ""),
    ]


@pytest.mark.parametrize(
    ("estimate", "proof", "told"),
    [
        (ESTIMATE, None, [("step", "2 s", "50.0% of the peak"), ("memory", "40.0 GiB", "50% of 80.0 GiB")]),
        (
            ESTIMATE,
            PROOF,
            [
                ("step, estimated", "2 s", "50.0% of the peak"),
                ("memory, estimated", "40.0 GiB", "50% of 80.0 GiB"),
                ("step, compiled", "1 s", "-50.0%"),
                ("memory, compiled", "60.0 GiB", "+50.0%, 75% of 80.0 GiB"),
            ],
        ),
        (None, PROOF, [("step, compiled", "1 s", ""), ("memory, compiled", "60.0 GiB", "75% of 80.0 GiB")]),
        (None, None, []),
    ],
)
def test_figures_say_whose_they_are(
    estimate: Estimate | None, proof: Proof | None, told: list[tuple[str, str, str]]
) -> None:
    found = cost_figures(estimate, proof, 80 * GIB)
    assert [(one.name, one.value, one.detail) for one in found] == told


def test_memory_is_drawn_against_what_a_device_has() -> None:
    drawing, _, words = memory_chapter(ESTIMATE, None, 80 * GIB).blocks
    assert isinstance(drawing, Drawing)
    assert "40.0 GiB stay free" in drawing.svg
    assert isinstance(words, Text)
    assert "44.0 GiB" in str(words.words)


def test_what_nobody_knows_is_no_chapter() -> None:
    assert time_chapter(None, None).blocks == ()
    assert memory_chapter(None, None, 80 * GIB).blocks == ()
