"""Documents as HTML: whole, escaped, and with every row that they were given."""

from __future__ import annotations

import re

from meshwright.sharding.report import html
from meshwright.sharding.report.document import (
    Bar,
    Bars,
    Chapter,
    Column,
    Cut,
    Document,
    Drawing,
    Entry,
    Figure,
    Phrase,
    Segment,
    Table,
    Text,
)


def fragment(*blocks: Text | Bars | Table | Drawing) -> str:
    """Return what a document of one chapter adds to its style."""
    document = Document(name="", title="", chapters=(Chapter(title="some title", blocks=blocks),))
    return html.fragment(document).split("</style>")[1]


def test_names_are_no_markup() -> None:
    name = '<b>"&'
    bar = Bar(name=name, figures=(name,), tracks=((Segment(part=0.5, kind="talk"),),), notes=(name,))
    table = Table(columns=(Column(name=name),), entries=(Entry(cells=(name,)),))
    document = Document(
        name=name,
        title=name,
        figures=(Figure(name=name, value=name, detail=name),),
        warnings=(name,),
        chapters=(Chapter(title=name, blocks=(Bars(bars=(bar,), head=(name,)), table, Text(words=name))),),
    )
    written = html.page(document)
    assert "<b>&" not in written
    assert written.count("&lt;b&gt;&quot;&amp;") == 14


def test_titles_begin_with_a_capital() -> None:
    assert "<h2>Some title</h2>" in fragment(Text(words="x"))


def test_drawings_stand_side_by_side_and_say_what_they_leave_out() -> None:
    drawing = Drawing(
        svg="<svg></svg>", caption="fsdp=8", note="not drawn: 3 hosts", legend={"rival": "fits"}
    )
    written = fragment(Text(words="before"), drawing, drawing, Text(words="after"))
    (group,) = re.findall(r'<div class="drawings">(.*?)</div>', written)
    assert group.count("<svg>") == 2
    assert "fsdp=8 <small>(not drawn: 3 hosts)</small>" in group
    assert '<i class="rival"></i>fits' in group


def test_bars_are_as_wide_as_their_parts() -> None:
    tracks = (
        (Segment(part=0.5, kind="before"),),
        (Segment(part=0.25, kind="talk"), Segment(part=0.125, kind="talk hidden")),
    )
    written = fragment(
        Bars(bars=(Bar(name="a", figures=("1",), tracks=tracks),), head=("n",), legend={"talk": "waits"})
    )
    assert re.findall(r'<i class="([\w ]+)" style="width:([\d.]+)%', written) == [
        ("before", "50.00"),
        ("talk", "25.00"),
        ("talk hidden", "12.50"),
    ]
    assert '<i class="talk"></i>waits' in written
    assert '<th class="n">n</th>' in written


def test_a_cut_dimension_names_its_axes() -> None:
    cut = Cut(shape=(4096, 128), axes=(("fsdp", "tensor"), ()))
    written = fragment(Table(columns=(Column(name="shape"),), entries=(Entry(cells=(cut,)),)))
    assert (
        '<span class="cut">4,096<small>fsdp x tensor</small></span><span class="kept">128</span>' in written
    )


def test_late_rows_wait_to_be_asked_for() -> None:
    rows = tuple(
        Entry(cells=(f"row{n}", (Phrase(text="x", tone="code"),)), key=f"m{n % 8}") for n in range(9)
    )
    columns = (Column(name="a"), Column(name="b"))
    written = fragment(Table(columns=columns, entries=rows, most=3))
    assert re.findall(r'<tr class=" late">.*?(row\d)', written) == ["row6", "row7", "row8"]
    assert '<input type="checkbox">3 more' in written
    # The head has a cell for the colours' column as well.
    assert written.count("<th") == 3
    assert "checkbox" not in fragment(Table(columns=columns, entries=rows, most=5))


def test_a_notebook_lays_out_nothing_within() -> None:
    """JupyterLab gives tables, lists and headings rules of up to two classes and two tags."""
    style = html.fragment(Document(name="", title="", chapters=())).split("</style>")[0]
    style = re.sub(r"@media[^{]*\{", "", style.removeprefix("<style>"))
    selectors = re.split(",", ",".join(re.findall(r"([^{}]+)\{", style)))
    assert selectors
    assert {one.count(".meshwright-plan") for one in selectors} == {3}
    # What is not said here is as browsers have it, drawings apart, whose attributes are rules to them.
    assert f"{'.meshwright-plan' * 3} :where(:not(svg):not(svg *)){{all:revert}}" in style
