"""What a plan shows: the same facts in a terminal, in a notebook and as a page."""

from __future__ import annotations

import dataclasses
import io
import pathlib
import re
from html.parser import HTMLParser
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.sharding import Plan, declare, plan
from meshwright.sharding.plans.origin import is_bound
from meshwright.sharding.report import html
from meshwright.sharding.report.plan import plan_document
from meshwright.sharding.report.terminal import Printed
from rich.console import Console

CONFIGS = pathlib.Path(__file__).parents[3] / "configs"
VOID = {"meta", "rect", "line", "circle", "input"}


def loss(params: Any, batch: Any) -> Any:
    hidden = jax.nn.gelu(batch["x"] @ params["<up>"]) @ params["down"]
    return jnp.mean((hidden - batch["y"]) ** 2)


PARAMS = {
    "<up>": jax.ShapeDtypeStruct((1024, 4096), "float32"),
    "down": jax.ShapeDtypeStruct((4096, 1024), "float32"),
}
ROWS = {key: jax.ShapeDtypeStruct((4096, 1024), "float32") for key in ("x", "y")}


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan(loss, PARAMS, ROWS, topology="2*v5p:2x2x4", optimizer=optax.adamw(1e-3))


class Balanced(HTMLParser):
    """Checks that every element that is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page(planned: Plan) -> str:
    return html.page(plan_document(planned))


def words(markup: str) -> str:
    parser = Balanced()
    parser.feed(markup)
    parser.close()
    assert not parser.open
    return " ".join(parser.text)


def terminal(planned: Plan, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(Printed(plan_document(planned)))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_page_is_whole_and_needs_nothing_else(planned: Plan) -> None:
    written = page(planned)
    assert f"<title>Plan for {planned.topology}</title>" in written
    words(written)
    assert not re.search(r"https?://|src=|href=|<script|@import|url\(", written)


def test_the_page_says_what_the_plan_does(planned: Plan) -> None:
    text = words(page(planned))
    assert planned.estimate is not None
    assert str(planned.topology) in text
    assert f"{planned.estimate.mfu:.1%}" in text
    for axis, size in planned.mesh.items():
        assert size == 1 or f"{axis}={size}" in text
    for name in planned.estimate.memory:
        assert name in text or planned.estimate.memory[name] < 0.01 * planned.estimate.peak_bytes
    assert planned.alternatives[0].lost in text


def test_names_are_no_markup(planned: Plan) -> None:
    assert "<up>" in words(page(planned))
    assert "<up>" not in page(planned)
    assert "<up>" in terminal(planned)


def test_every_device_is_drawn_once_for_each_axis(planned: Plan) -> None:
    drawn = re.findall(r'<svg class="mesh".*?</svg>', page(planned))
    assert len(drawn) == sum(size > 1 for size in planned.mesh.values())
    assert all(svg.count("<rect") == 32 for svg in drawn)


def test_a_notebook_shows_the_fragment_alone(planned: Plan) -> None:
    shown = planned._repr_html_()
    assert shown == html.fragment(plan_document(planned))
    assert shown in page(planned)
    style = shown[len("<style>") : shown.index("</style>")]
    for rule in re.findall(r"(?:^|\}|\{(?=\.))([^{}@]+)\{", style):
        assert all(part.strip().startswith(".meshwright-plan") for part in rule.split(",")), rule


def test_the_table_fits_a_terminal(planned: Plan) -> None:
    text = terminal(planned)
    assert max(map(len, text.splitlines())) <= 80
    assert "[fsdp" in text or "fsdp]" in text or "[-" in text
    assert planned.estimate is not None
    assert f"{planned.estimate.mfu:.1%} of the peak" in text


def test_a_plan_shows_what_it_has() -> None:
    declared = declare(loss, PARAMS, ROWS, topology="cpu:8", mesh={"fsdp": 8})
    bare = dataclasses.replace(declared, estimate=None, alternatives=(), notes=())
    for shown in (declared, bare):
        assert "fsdp=8" in words(page(shown))
        for said in (terminal(shown), words(page(shown))):
            assert ("of the peak" in said) == (shown.estimate is not None)
            assert all(note in " ".join(said.split()) for note in shown.notes)


def test_a_page_of_many_devices_stays_small() -> None:
    many = plan(loss, PARAMS, ROWS, topology="h100:512x8", optimizer=optax.adamw(1e-3))
    written = page(many)
    assert len(written) < 400_000
    assert "not drawn: 480 more hosts" in words(written)


def test_a_terminal_and_a_page_say_the_same_of_what_lost(planned: Plan) -> None:
    said = words(page(planned))
    lines = " ".join(terminal(planned, 400).split())
    for row in planned.alternatives[:3]:
        assert row.lost in said
        assert row.lost in lines


def test_a_bound_is_marked_wherever_its_time_is_told() -> None:
    shipped = Plan.load(CONFIGS / "plans" / "llama3-8b.v5p-4x4x8.plan.json")
    bounds = [row for row in shipped.alternatives if is_bound(row)]
    assert {row.mesh["tensor"] for row in bounds} >= {8, 16}
    said = words(page(shipped))
    for row in bounds:
        assert re.search(rf"≥ {row.estimate.step_seconds:.3g} s", said)
    assert "≥:" in said
    assert "≥:" in " ".join(terminal(shipped).split())
    fits = dataclasses.replace(shipped, alternatives=tuple(r for r in shipped.alternatives if r.fits))
    assert "≥" not in words(page(fits))
    # The plot draws a bound as such, and tells its dots apart.
    dots = re.findall(r'<circle class="(chosen|rival|misfit|bound)"', page(shipped))
    assert dots.count("bound") == len({id(row) for row in bounds})
    assert dots.count("chosen") == 1


def test_the_page_keeps_every_row_and_shows_the_first() -> None:
    params = {f"layer{n:02}": jax.ShapeDtypeStruct((256, 256), "float32") for n in range(40)}

    def many(params: Any, batch: Any) -> Any:
        x = batch["x"]
        for name in sorted(params):
            x = jnp.tanh(x @ params[name])
        return jnp.mean(x**2)

    rows = {"x": jax.ShapeDtypeStruct((64, 256), "float32")}
    declared = declare(many, params, rows, topology="cpu:8", mesh={"fsdp": 8})
    written = page(declared)
    assert all(name in words(written) for name in params)
    assert written.count(" late") == 8
    assert "8 more" in words(written)
    assert "and 24 more" in terminal(declared)
