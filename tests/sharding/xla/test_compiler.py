"""Facts of compilers: every one says where it was seen, and a topology's compiler has its own."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
from meshwright.sharding import Topology
from meshwright.sharding.hardware.chip import chips
from meshwright.sharding.xla import compiler
from meshwright.sharding.xla.compiler import Compiler, compiler_of

QUIRKS = tomllib.loads(Path(compiler.__file__).with_name("quirks.toml").read_text())


def test_every_fact_is_of_a_known_compiler_and_chips_and_says_how_it_was_seen():
    fields = {field.name: field.type for field in dataclasses.fields(Compiler)}
    assert set(QUIRKS) == set(fields) - {"name"}
    for rows in QUIRKS.values():
        for row in rows:
            assert set(row) - {"chips"} == {"compiler", "versions", "value", "seen"}
            assert row["compiler"] in ("libtpu", "xla:gpu", "xla:cpu")
            assert set(row.get("chips", ())) <= set(chips())
            assert len(row["seen"]) > 20


@pytest.mark.parametrize(
    ("topology", "reduces_whole", "last_layer_apart", "reduces_cast", "aligned_elements"),
    [
        ("h100:4x8", True, False, False, 8),
        ("v5p:4x4x4", False, True, True, 1),
        ("cpu:8", False, False, False, 1),
    ],
)
def test_a_topologys_compiler_has_the_facts_of_its_own_rows(
    topology, reduces_whole, last_layer_apart, reduces_cast, aligned_elements
):
    found = compiler_of(Topology.parse(topology))
    assert found.reduces_whole is reduces_whole
    assert found.last_layer_apart is last_layer_apart
    assert found.reduces_cast is reduces_cast
    assert found.aligned_elements == aligned_elements


def test_a_row_may_hold_on_some_chips_alone(monkeypatch):
    rows = {"reduces_whole": [{"compiler": "libtpu", "chips": ["v4"], "value": True}]}
    monkeypatch.setattr(compiler, "quirks", lambda: rows)
    of = compiler._compiler.__wrapped__
    assert of("libtpu", "v4").reduces_whole
    assert not of("libtpu", "v5e").reduces_whole
