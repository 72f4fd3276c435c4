"""What the compiler made of a plan, in a terminal and as a page; proofs are written down here."""

from __future__ import annotations

import dataclasses
import io
import itertools
import pathlib
import re
from html.parser import HTMLParser
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.sharding import Plan, plan
from meshwright.sharding.hlo.text import SourceLine
from meshwright.sharding.plans.proof import Buffer, CompiledCollective, Finding, LineCost, Proof
from meshwright.sharding.report import html
from meshwright.sharding.report.costs import memory_chapter, time_chapter
from meshwright.sharding.report.document import Bar, Bars, Chapter, Document
from meshwright.sharding.report.plan import plan_document
from meshwright.sharding.report.proof import compiler_of, place
from meshwright.sharding.report.terminal import Printed
from rich.console import Console

GIB = 2.0**30
MODEL = SourceLine(file=str(pathlib.Path("models", "mlp.py").absolute()), line=12, function="layer")


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((jax.nn.gelu(batch["x"] @ params["up"]) @ params["down"] - batch["x"]) ** 2)


PARAMS = {
    "up": jax.ShapeDtypeStruct((1024, 4096), "float32"),
    "down": jax.ShapeDtypeStruct((4096, 1024), "float32"),
}
ROWS = {"x": jax.ShapeDtypeStruct((4096, 1024), "float32")}

GATHER = CompiledCollective(
    kind="all_gather",
    axes=("fsdp",),
    count=6,
    bytes=3 * GIB,
    wire_bytes=2 * GIB,
    seconds=0.04,
    exposed_seconds=0.01,
    algorithm="PincerEmitter/StrategyND colors:3",
    asynchronous=True,
)
REDUCE = CompiledCollective(
    kind="all_reduce",
    axes=("data", "fsdp"),
    count=2,
    bytes=GIB,
    wire_bytes=2 * GIB,
    seconds=0.09,
    exposed_seconds=0.09,
    algorithm="a_very_long_name_of_an_algorithm_that_does_not_fit/beside_anything_else_in_a_terminal",
    asynchronous=False,
    source=MODEL,
)
PROOF = Proof(
    topology="v5p:2x2x4",
    versions={"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.42.1"},
    peak_bytes=48 * GIB,
    step_seconds=0.5,
    compile_seconds=3.21,
    time={"compute": 0.4, "all_gather/fsdp": 0.01, "all_reduce/data×fsdp": 0.09},
    memory={"arguments": 2 * GIB, "temporaries": 46 * GIB, "outputs": 0.0, "code": 0.0, "host": 0.0},
    collectives=(GATHER, REDUCE),
    findings=(
        Finding(kind="kept_whole", what="<up> is kept whole", remedy="shard it", bytes=GIB),
        Finding(
            kind="all_reduce",
            what="the gradient of up is summed by an all-reduce where a reduce-scatter was planned",
            remedy="try fsdp=4 [one torus axis]",
            seconds=0.09,
            source=MODEL,
        ),
    ),
    buffers=(
        Buffer(name="hidden", shape="f32[256,4096]", bytes=16 * GIB, source=MODEL),
        Buffer(name="grad <up>", shape="f32[1024,4096]", bytes=20 * GIB),
    ),
    lines=(LineCost(source=MODEL, seconds=0.3),),
    timeline=tuple(GIB * size for size in (8, 16, 32, 48, 28, 8)),
)


@pytest.fixture(scope="module")
def proved() -> Plan:
    found = plan(loss, PARAMS, ROWS, topology="v5p:2x2x4", optimizer=optax.adamw(1e-3))
    return dataclasses.replace(found, proof=PROOF)


def terminal(shown: Plan, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(Printed(plan_document(shown)))
    return console.file.getvalue()  # type: ignore[attr-defined]


def page(shown: Plan) -> str:
    return html.page(plan_document(shown))


def line_with(text: str, words: str) -> str:
    """Return the first line with `words`, without its bars."""
    return re.sub("[█▀▄░▏]", " ", next(line for line in text.splitlines() if words in line))


def chapter(document: Document, title: str) -> Chapter:
    return next(one for one in document.chapters if title in one.title)


def bars_of(one: Chapter) -> dict[str, Bar]:
    (block,) = (block for block in one.blocks if isinstance(block, Bars))
    return {bar.name: bar for bar in block.bars}


def parts(bar: Bar, kind: str) -> float:
    """Return how much of the full width a bar's segments of a kind take."""
    return sum(one.part for track in bar.tracks for one in track if one.kind == kind)


def test_estimated_and_compiled_items_stand_beside_each_other(proved: Plan) -> None:
    assert proved.estimate is not None
    time = bars_of(time_chapter(proved.estimate, proved.proof))
    whole = [bar for bar in time.values() if bar.depth == 0]
    estimated = sum(parts(bar, "before") for bar in whole)
    compiled = sum(parts(bar, "compute") + parts(bar, "talk") for bar in whole)
    assert estimated / compiled == pytest.approx(proved.estimate.step_seconds / PROOF.step_seconds)
    hidden = parts(time["all_gather/fsdp"], "talk hidden") / parts(time["all_gather/fsdp"], "talk")
    assert hidden == pytest.approx((GATHER.seconds - GATHER.exposed_seconds) / GATHER.exposed_seconds)
    assert parts(time["all_reduce/data×fsdp"], "talk hidden") == 0.0
    # A part in 10^15 is rounding, not something hidden.
    rounded = dataclasses.replace(REDUCE, exposed_seconds=REDUCE.seconds * (1 - 1e-15))
    proof = dataclasses.replace(PROOF, collectives=(rounded,))
    assert parts(bars_of(time_chapter(None, proof))["all_reduce/data×fsdp"], "talk hidden") == 0.0
    memory = bars_of(memory_chapter(proved.estimate, proved.proof, None))
    whole = [bar for bar in memory.values() if bar.depth == 0]
    ratio = sum(parts(bar, "before") for bar in whole) / sum(parts(bar, "compute") for bar in whole)
    assert ratio == pytest.approx(proved.estimate.peak_bytes / PROOF.peak_bytes)


def test_what_only_the_estimate_takes_apart_stands_below_its_sum(proved: Plan) -> None:
    for one in (
        time_chapter(proved.estimate, proved.proof),
        memory_chapter(proved.estimate, proved.proof, None),
    ):
        rows = list(bars_of(one).values())
        for place_, bar in enumerate(rows):
            below = list(itertools.takewhile(lambda row: row.depth, rows[place_ + 1 :]))
            if bar.depth == 0 and below:
                within = sum(segment.part for row in below for segment in row.tracks[0])
                assert within == pytest.approx(parts(bar, "before"))
                assert all(row.figures[1] == "" for row in below)
    assert proved.estimate is not None
    text = terminal(proved)
    for name in [*proved.estimate.time, *proved.estimate.memory]:
        if name.startswith("compute/") or name == "saved_activations":
            assert name in text


def test_what_no_compiler_knows_is_not_shown_as_nothing(proved: Plan) -> None:
    assert proved.estimate is not None
    slow = dataclasses.replace(proved.estimate, time={**proved.estimate.time, "bubble": 2.0})
    assert bars_of(time_chapter(slow, proved.proof))["bubble"].figures == ("2 s", "-", "")


def test_a_plan_without_a_proof_shows_none(proved: Plan) -> None:
    bare = dataclasses.replace(proved, proof=None)
    assert "compiled" not in terminal(bare)
    assert "ompiled" not in Words.of(page(bare))


def test_the_terminal_says_it_in_80_columns(proved: Plan) -> None:
    text = terminal(proved)
    assert max(map(len, text.splitlines())) <= 80
    assert "compiled by libtpu 0.0.42.1 in 3.2 s" in text
    assert line_with(text, "step, compiled").split()[2:4] == ["500", "ms"]
    assert line_with(text, "memory, compiled").split()[2:4] == ["48.0", "GiB"]
    assert line_with(text, "all_gather/fsdp  ").split()[1:] != []
    found = line_with(text[text.index("collectives") :], "all_gather/fsdp").split()
    assert found == ["all_gather/fsdp", "6", "3.0", "GiB", "40", "ms", "10", "ms"]
    assert "asynchronous, 75% beside computing, PincerEmitter/StrategyND colors:3" in text
    assert "models/mlp.py:12" in text
    assert "→ try fsdp=4 [one torus axis]" in text
    assert "fullest: 48.0 GiB of 95.0 GiB that a device has\n" in text


def test_findings_and_buffers_come_by_cost(proved: Plan) -> None:
    document = plan_document(proved)
    found = chapter(document, "findings").blocks[0]
    assert isinstance(found, Bars)
    # What costs no time has its bar and its share by its bytes.
    assert [(bar.name, *bar.figures) for bar in found.bars] == [
        ("all reduce", "90 ms", "18.0% of the step"),
        ("kept whole", "1.0 GiB", "2.1% of the memory"),
    ]
    talk = chapter(document, "collectives").blocks[0]
    assert isinstance(talk, Bars)
    assert [bar.name for bar in talk.bars] == ["all_reduce/data×fsdp", "all_gather/fsdp"]
    held = terminal(proved)
    held = held[held.index("largest when memory is fullest") :]
    assert held.index("20.0 GiB") < held.index("16.0 GiB")


def test_collectives_beyond_those_printed_are_added_up(proved: Plan) -> None:
    many = tuple(dataclasses.replace(GATHER, axes=(f"axis{n}",), seconds=0.1 - n / 1e3) for n in range(10))
    text = terminal(dataclasses.replace(proved, proof=dataclasses.replace(PROOF, collectives=many)))
    rest = line_with(text, "and 2 more").split()
    assert rest == ["and", "2", "more", "12", "6.0", "GiB", "183", "ms", "20", "ms"]
    assert "axis7" in text
    assert "all_gather/axis8" not in text[text.index("collectives as compiled") :]


def test_a_declared_plan_shows_the_compiled_figures_alone(proved: Plan) -> None:
    text = terminal(dataclasses.replace(proved, estimate=None, alternatives=()))
    assert line_with(text, "step, compiled").split() == ["step,", "compiled", "500", "ms"]
    assert "step, estimated" not in text
    assert line_with(text, "  compute ").split() == ["compute", "-", "400", "ms"]


def test_an_answer_from_the_cache_is_said_to_be_one(proved: Plan) -> None:
    cached = dataclasses.replace(proved, proof=dataclasses.replace(PROOF, cached=True))
    assert "in 3.2 s, known from before" in " ".join(terminal(cached).split())


class Words(HTMLParser):
    """Gathers what a document says, and checks that what is opened is closed."""

    VOID = ("meta", "rect", "line", "circle", "polygon", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.said: list[str] = []

    @classmethod
    def of(cls, markup: str) -> str:
        parser = cls()
        parser.feed(markup)
        parser.close()
        assert not parser.open
        return " ".join(parser.said)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.said.append(data)


def test_the_page_says_the_same(proved: Plan) -> None:
    written = page(proved)
    said = Words.of(written)
    for words in ("compiled by libtpu 0.0.42.1", "<up> is kept whole", "try fsdp=4", "models/mlp.py:12"):
        assert words in said
    assert "<up>" not in written
    assert not re.search(r"https?://|src=|href=|<script|@import|url\(", written)


def test_the_timeline_is_drawn_to_scale(proved: Plan) -> None:
    svg = re.search(r'<svg class="timeline".*?</svg>', page(proved), re.S)
    assert svg is not None
    drawn = svg[0]
    area = re.search(r'points="([^"]*)"', drawn)
    assert area is not None
    floor, *tops = [float(point.split(",")[1]) for point in area[1].split()][:-1]
    heights = [floor - top for top in tops]
    assert heights == pytest.approx([heights[3] * size / 48 for size in (8, 16, 32, 48, 28, 8)], abs=0.1)
    limit = re.search(r'class="limit"[^>]*y1="([\d.]+)"', drawn)
    assert limit is not None
    assert (floor - float(limit[1])) / heights[3] == pytest.approx(95.0 / 48, rel=0.01)
    # Buffers by size, then what else is held at the peak.
    held = re.findall(r'<rect class="(\w+)"[^>]* height="([\d.]+)"><title>([^<]*)', drawn)
    assert [kind for kind, _, _ in held] == ["m0", "m1", "else"]
    assert [float(height) / heights[3] for _, height, _ in held] == pytest.approx(
        [20 / 48, 16 / 48, 12 / 48], abs=0.01
    )
    assert held[0][2] == "grad &lt;up&gt; f32[1024,4096]: 20.0 GiB"


def test_a_small_step_is_not_a_flat_line_under_a_large_device(proved: Plan) -> None:
    small = dataclasses.replace(PROOF, peak_bytes=2 * GIB, timeline=(GIB, 2 * GIB), buffers=())
    shown = dataclasses.replace(proved, proof=small)
    svg = page(shown).split('<svg class="timeline"')[1].split("</svg>")[0]
    assert 'class="limit"' not in svg
    assert "a device has 95.0 GiB, far above this picture" in svg
    assert "fullest: 2.0 GiB of 95.0 GiB that a device has; drawn to 2.0 GiB" in terminal(shown)


def test_a_remedy_is_told_once(proved: Plan) -> None:
    twice = dataclasses.replace(PROOF, findings=(*PROOF.findings, *PROOF.findings))
    shown = dataclasses.replace(proved, proof=twice)
    for said in (terminal(shown), Words.of(page(shown))):
        assert said.count("try fsdp=4") == 1
        assert said.count("as above") == 2


def test_hidden_parts_of_collectives_are_told_apart(proved: Plan) -> None:
    rows = page(proved).split("Collectives as compiled")[1].split("</section>")[0].split("<tr ")
    gather = next(row for row in rows if "all_gather/fsdp" in row)
    widths = re.findall(r'<i class="([\w ]+)" style="width:([\d.]+)%', gather)
    assert [(kind, float(width)) for kind, width in widths] == [
        ("talk", pytest.approx(100 * 0.01 / 0.09, abs=0.01)),
        ("talk hidden", pytest.approx(100 * 0.03 / 0.09, abs=0.01)),
    ]
    reduce = next(row for row in rows if "all_reduce" in row)
    assert "hidden" not in reduce


def test_places_are_short() -> None:
    assert place(SourceLine(file="/elsewhere/lib/pkg/block.py", line=3)) == "pkg/block.py:3"
    assert place(MODEL) == "models/mlp.py:12"
    assert place(MODEL, function=True) == "models/mlp.py:12 layer"
    assert place(None) == ""


def test_the_compiler_is_the_platforms_own() -> None:
    assert compiler_of({"jax": "0.10.2", "jaxlib": "0.10.3"}) == "jaxlib 0.10.3"
    assert compiler_of({"jax": "0.12", "jaxlib": "0.12", "libtpu": "0.0.50.1"}) == "libtpu 0.0.50.1"


def test_a_step_that_was_really_compiled_is_shown_whole() -> None:
    # An answer from before may tell of the same program's lines in another file.
    planned = plan(loss, PARAMS, ROWS, topology="cpu:8", optimizer=optax.adamw(1e-3))
    compiled = planned.verify(use_cache=False)
    assert compiled.proof is not None
    text = terminal(compiled)
    assert max(map(len, text.splitlines())) <= 80
    assert f"compiled by jaxlib {compiled.proof.versions['jaxlib']} in " in text
    assert compiled.proof.collectives
    for row in compiled.proof.collectives:
        assert f"{row.kind}/{'×'.join(row.axes)}" in text
    said = Words.of(page(compiled))
    assert "Memory through the step" in said
    assert "test_proof.py:" in said
