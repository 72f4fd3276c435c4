"""Pictures: their proportions, and what they say of what they do not draw."""

from __future__ import annotations

import re

import pytest
from meshwright.sharding import Topology
from meshwright.sharding.report.drawings import (
    Dot,
    layouts_plot,
    memory_stack,
    memory_timeline,
    mesh_drawings,
    timeline_art,
)

GIB = 2.0**30


def test_devices_are_coloured_by_their_place_along_an_axis() -> None:
    drawn = list(mesh_drawings({"data": 1, "fsdp": 4, "tensor": 4}, Topology.parse("v5p:2x2x4")))
    assert [axis for axis, _, _ in drawn] == ["fsdp", "tensor"]
    for _, svg, left_out in drawn:
        places = re.findall(r"<title>(\d+)</title>", svg)
        assert {place: places.count(place) for place in places} == dict.fromkeys("0123", 4)
        assert svg.count("<rect") == 16
        assert left_out == ""


def test_what_is_not_drawn_is_said() -> None:
    ((_, svg, left_out),) = mesh_drawings({"data": 4096}, Topology.parse("v5p:16x16x16"))
    assert left_out == "8 more planes"
    assert svg.count("<rect") == 8 * 256
    ((_, _, left_out),) = mesh_drawings({"data": 1024}, Topology.parse("h100:128x8"))
    assert left_out == "96 more hosts"


def test_memory_is_stacked_to_scale() -> None:
    svg = memory_stack([("a 20 GiB", 20 * GIB, "m0"), ("b 40 GiB", 40 * GIB, "m1")], 80 * GIB)
    rows = re.findall(r'<rect class="(\w+)" x="([\d.]+)" y="0" width="([\d.]+)"', svg)
    assert [(kind, float(x), float(width)) for kind, x, width in rows] == [
        ("free", 0, 100),
        ("m0", 0, 25),
        ("m1", 25, 50),
    ]
    assert "20.0 GiB stay free" in svg
    assert "free</title>" not in memory_stack([("a", 80 * GIB, "m0")], None)


def test_no_timeline_is_no_picture() -> None:
    assert memory_timeline((), [], 95 * GIB) == ""
    assert timeline_art((), 95 * GIB) == ()


@pytest.mark.parametrize("length", [10, 72, 73, 1000])
def test_a_peak_of_one_moment_is_drawn_in_full(length: int) -> None:
    timeline = [GIB] * length
    timeline[length // 2] = 8 * GIB
    *rows, told = timeline_art(timeline, None)
    assert "█" in rows[0]
    assert max(map(len, rows)) == 1 + min(length, 72)
    assert told == "fullest: 8.0 GiB; drawn to 8.0 GiB"
    assert "fullest: 8.0 GiB" in memory_timeline(timeline, [], None)


def test_layouts_stand_where_their_costs_are() -> None:
    dots = [
        Dot(seconds=1.0, bytes=10 * GIB, kind="chosen", words="a"),
        Dot(seconds=2.0, bytes=20 * GIB, kind="rival", words="b"),
        Dot(seconds=4.0, bytes=40 * GIB, kind="bound", words="<c>"),
    ]
    svg = layouts_plot(dots, 80 * GIB)
    drawn = re.findall(r'<circle class="(\w+)" cx="([\d.]+)" cy="([\d.]+)" r="(\d)"', svg)
    # The chosen one is drawn last, above the others, and larger.
    assert [(kind, r) for kind, _, _, r in drawn] == [("bound", "5"), ("rival", "5"), ("chosen", "7")]
    x, y = ([float(row[place]) for row in reversed(drawn)] for place in (1, 2))
    limit = re.search(r'class="limit"[^>]*y1="([\d.]+)"', svg)
    assert limit is not None
    # Equal factors are equal distances.
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert (
        y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2) == pytest.approx(y[2] - float(limit[1]), abs=0.2)
    )
    assert "&lt;c&gt;: 4 s, 40.0 GiB" in svg
    assert "a device has 80.0 GiB" in svg
