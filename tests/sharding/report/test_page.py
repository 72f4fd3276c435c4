"""What a plan shows: the same facts in a terminal, in a notebook and as a page."""

from __future__ import annotations

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
from meshwright.sharding.report.page import fragment, page, write_page
from meshwright.sharding.report.plan_table import plan_table
from rich.console import Console

VOID = {"meta", "rect", "line", "circle"}


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


def words(html: str) -> str:
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert not parser.open
    return " ".join(parser.text)


def terminal(planned: Plan, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(plan_table(planned))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_page_is_whole_and_needs_nothing_else(planned: Plan, tmp_path: pathlib.Path) -> None:
    write_page(planned, tmp_path / "plan.html")
    html = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert html == page(planned)
    words(html)
    assert not re.search(r"https?://|src=|href=|<script|@import|url\(", html)


def test_the_page_says_what_the_plan_does(planned: Plan) -> None:
    text = words(page(planned))
    assert planned.estimate is not None
    assert planned.topology in text
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
    assert shown == fragment(planned)
    style = shown[len("<style>") : shown.index("</style>")]
    for rule in re.findall(r"(?:^|\}|\{(?=\.))([^{}@]+)\{", style):
        assert all(part.strip().startswith(".meshwright-plan") for part in rule.split(",")), rule


def test_the_table_fits_a_terminal(planned: Plan) -> None:
    text = terminal(planned)
    assert max(map(len, text.splitlines())) <= 80
    assert "[fsdp" in text or "fsdp]" in text or "[-" in text
    assert planned.estimate is not None
    assert f"{planned.estimate.mfu:.1%} of the peak" in text


def test_a_declared_plan_shows_what_it_has() -> None:
    declared = declare(loss, PARAMS, ROWS, topology="cpu:8", mesh={"fsdp": 8})
    assert "fsdp=8" in words(page(declared))
    assert "of the peak" not in terminal(declared)


def test_a_page_of_many_devices_stays_small() -> None:
    many = plan(loss, PARAMS, ROWS, topology="h100:512x8", optimizer=optax.adamw(1e-3))
    html = page(many)
    assert len(html) < 400_000
    assert "not drawn: 480 more hosts" in words(html)
