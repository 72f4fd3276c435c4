"""Documents in a terminal: folded to its width, with nothing cut off."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
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
    List,
    Phrase,
    Segment,
    Table,
    Text,
)
from meshwright.sharding.report.terminal import Printed, plain_text
from rich.console import Console

NAMES = st.text("abcdefgh/_ ", min_size=1, max_size=90).filter(lambda name: name.strip())


def printed(*blocks: Text | List | Bars | Table | Drawing, width: int = 80) -> list[str]:
    document = Document(name="", title="title", chapters=(Chapter(title="chapter", blocks=blocks),))
    return plain_text(document, width).splitlines()[3:]


def squeezed(text: str) -> str:
    return "".join(text.split())


@given(st.lists(NAMES, min_size=1, max_size=4), st.integers(40, 100))
def test_long_words_are_folded_and_none_is_lost(names: list[str], width: int) -> None:
    columns = (Column(name="a"), Column(name="b"), Column(name="size", figures=True))
    rows = tuple(Entry(cells=(name, (Phrase(text=name, tone="code"),), "1.5 GiB")) for name in names)
    bars = tuple(Bar(name=name, figures=("1.5 GiB",), notes=(name,)) for name in names)
    for block in (Table(columns=columns, entries=rows), Bars(bars=bars), List(items=tuple(names))):
        lines = printed(block, width=width)
        assert max(map(len, lines)) <= width
        said = squeezed("".join(lines))
        assert all(said.count(letter) >= squeezed("".join(names)).count(letter) for letter in "abcdefgh/_")


def test_a_path_is_broken_after_a_slash() -> None:
    columns, path = (Column(), Column(figures=True)), "layers/attention_norm/scale"
    lines = printed(Table(columns=columns, entries=(Entry(cells=(path, "12")),)), width=28)
    assert [line.split() for line in lines] == [["layers/attention_norm/", "12"], ["scale"]]


def test_figures_stand_below_one_another_on_the_right() -> None:
    bars = (
        Bar(name="long name", figures=("1 s", "5"), tracks=((Segment(part=1.0, kind="talk"),),)),
        Bar(name="b", figures=("100 ms", ""), tracks=((Segment(part=0.001, kind="talk"),),), depth=1),
        Bar(name="c", figures=("1 ms", ""), tracks=((),)),
    )
    lines = printed(Bars(bars=bars, head=("time", "n")), width=60)
    assert lines == [
        "               time  n",
        "  long name     1 s  5  " + "█" * 24,
        "    b        100 ms     ▏",
        "  c            1 ms",
    ]


@pytest.mark.parametrize(
    ("parts", "drawn"),
    [
        ((0.5, 0.25, 0.0), "██████▀▀▀▀▀▀"),
        ((0.25, 0.5, 0.0), "██████▄▄▄▄▄▄"),
        ((0.0, 0.5, 0.0), "▄▄▄▄▄▄▄▄▄▄▄▄"),
        ((0.25, 0.25, 0.25), "██████░░░░░░"),
        ((0.001, 0.5, 0.0), "█▄▄▄▄▄▄▄▄▄▄▄"),
    ],
)
def test_two_bars_share_a_line(parts: tuple[float, float, float], drawn: str) -> None:
    above, exposed, hidden = parts
    tracks = (
        (Segment(part=above, kind="before"),),
        (Segment(part=exposed, kind="talk"), Segment(part=hidden, kind="talk hidden")),
    )
    head, line = printed(Bars(bars=(Bar(name="a", figures=("1", "2"), tracks=tracks),), head=("x", "y")))
    assert head.split() == ["▀", "x", "▄", "y"]
    assert line.split() == ["a", "1", "2", drawn]


def test_bars_that_have_no_place_are_left_out() -> None:
    bar = Bar(name="n" * 40, figures=("1 s",), tracks=((Segment(part=1.0, kind="talk"),),))
    assert "█" not in "".join(printed(Bars(bars=(bar,)), width=52))
    assert "█" in "".join(printed(Bars(bars=(bar,)), width=57))


def test_more_rows_than_are_shown_are_counted_by_group() -> None:
    rows = tuple(
        Entry(cells=(f"{group}{n}", ""), group=group) for group in ("mesh", "params") for n in range(3)
    )
    lines = printed(Table(columns=(Column(), Column(figures=True)), entries=rows, most=2))
    assert [line.strip() for line in lines] == [
        "mesh0", "mesh1", "and 1 more mesh", "params0", "params1", "and 1 more params",
    ]  # fmt: skip
    bars = tuple(Bar(name=f"bar{n}", figures=(str(n),)) for n in range(4))
    assert printed(Bars(bars=bars, most=3))[-1].strip() == "and 1 more"
    summed = Bars(bars=bars, most=3, rest=Bar(name="and 1 more", figures=("3",)))
    assert printed(summed)[-1].split() == ["and", "1", "more", "3"]
    assert printed(List(items=("a", "b", "c"), most=2)) == ["  a", "  b", "  and 1 more"]


def test_what_a_terminal_does_not_draw_it_does_not_speak_of() -> None:
    drawing = Drawing(svg="<svg></svg>", art=("▁▂▃", "most"), caption="fsdp=8: ICI", note="not drawn: 3")
    assert printed(Text(words="Each square", page_only=True), drawing) == ["  ▁▂▃", "  most", "  fsdp=8: ICI"]
    cut = Cut(shape=(80, 8192), axes=((), ("fsdp", "tensor")))
    columns = (Column(name="shape"), Column(name="in all", figures=True, page_only=True))
    head, line = printed(Table(columns=columns, entries=(Entry(cells=(cut, "1 GiB")),)))
    assert (head.split(), line.split()) == (["shape", "cut", "by"], ["80x8192", "[-,", "fsdpxtensor]"])
    document = Document(
        name="", title="title", chapters=(Chapter(title="dims", blocks=(Text(words="x"),), page_only=True),)
    )
    assert plain_text(document) == "title"


def test_rich_prints_the_same_in_colour() -> None:
    document = Document(
        name="",
        title="[fsdp] title",
        figures=(Figure(name="step", value="1 s", detail="[of] two"),),
        warnings=("they differ",),
        chapters=(Chapter(title="chapter", blocks=(Text(words=(Phrase(text="x [bold]", tone="strong"),)),)),),
    )
    plain, coloured = (
        Console(file=io.StringIO(), width=60, force_terminal=on, color_system="standard" if on else None)
        for on in (False, True)
    )
    for console in (plain, coloured):
        console.print(Printed(document))
    text = plain.file.getvalue()  # type: ignore[attr-defined]
    assert text.rstrip("\n") == plain_text(document, 60)
    assert "[fsdp] title" in text
    assert "\x1b[1m[fsdp]" in coloured.file.getvalue()  # type: ignore[attr-defined]
