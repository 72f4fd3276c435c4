"""What is considered: meshes, dimensions, storage, and what declared parts leave of them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import zoo
from meshwright.models import DecoderConfig, decoder
from meshwright.sharding import Topology, UserError
from meshwright.sharding.planner.choices.mesh import meshes
from meshwright.sharding.planner.declared import Declared
from meshwright.sharding.planner.space import Space, space
from meshwright.sharding.program import Program, trace

MODEL = decoder(
    DecoderConfig(layers=2, embed=64, heads=8, kv_heads=4, head_dim=16, mlp=96, vocab=250, max_sequence=8)
)
PARAMS = jax.eval_shape(MODEL.init, jax.random.key(0))
BATCH = {key: jax.ShapeDtypeStruct((16, 8), jnp.int32) for key in ("tokens", "targets")}


@pytest.fixture(scope="module")
def program() -> Program:
    names = {0: MODEL.names, 1: dict.fromkeys(BATCH, ("batch", "sequence"))}
    return trace(MODEL.loss, PARAMS, BATCH, names=names)


def offered(program: Program, topology: str = "v5e:2x4", **declared: Any) -> Space:
    return space(program, Topology.parse(topology), Declared(**declared), params=PARAMS, names=MODEL.names)


def test_every_factorisation_is_there_once() -> None:
    found = meshes(Topology.parse("cpu:12"), {})
    assert len(found) == len({tuple(mesh.items()) for mesh in found}) == 18
    assert all(math.prod(mesh.values()) == 12 for mesh in found)
    assert all(mesh["tensor"] == 3 for mesh in meshes(Topology.parse("cpu:12"), {"tensor": 3}))
    assert meshes(Topology.parse("cpu:12"), {"fsdp": -1}) == [{"data": 1, "fsdp": 12, "tensor": 1}]


def test_experts_share_an_axis_as_far_as_it_divides_them() -> None:
    found = meshes(Topology.parse("cpu:12"), {}, experts=6)
    assert {mesh.get("expert", 1) for mesh in found} == {1, 2, 3, 6}
    assert len(found) == len({tuple(mesh.items()) for mesh in found})
    assert all(math.prod(mesh.values()) == 12 for mesh in found)
    declared = meshes(Topology.parse("cpu:12"), {"expert": 3, "data": 2}, experts=6)
    assert {mesh["expert"] for mesh in declared} == {3}


def test_between_slices_lies_only_data() -> None:
    found = meshes(Topology.parse("4*v5e:2x2"), {})
    assert {mesh["data"] % 4 for mesh in found} == {0}
    declared = meshes(Topology.parse("4*v5e:2x2"), {"fsdp": 16})
    assert declared == [{"data": 1, "fsdp": 16, "tensor": 1}]


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"tensr": 4}, "did you mean 'tensor'"),
        ({"tensor": 3}, "tensor=3 does not divide 8 devices; nearest: tensor=2 or 4"),
        ({"data": 4, "fsdp": 4, "tensor": 4}, "8 devices"),
        ({"data": 0}, "data=0"),
    ],
)
def test_meshes_that_cannot_be(mesh: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        meshes(Topology.parse("cpu:8"), mesh)


def test_tensor_takes_what_one_product_gives_and_the_next_contracts(program: Program) -> None:
    groups = {
        frozenset(program.dims[dim].name for dim, axes in layout.dims.items() if axes == ("tensor",))
        for layout in offered(program).layouts
        if layout.mesh["tensor"] == 4
    }
    assert frozenset({"kv_heads", "mlp"}) in groups
    assert frozenset({"embed"}) in groups
    assert not any({"embed", "mlp"} <= group for group in groups)
    # 250 words do not divide by 4, but by 2.
    two = [layout for layout in offered(program).layouts if layout.mesh["tensor"] == 2]
    assert any("vocab" in {program.dims[dim].name for dim in layout.dims} for layout in two)


def test_a_batch_that_does_not_divide_is_named() -> None:
    case = zoo.mlp()
    program = trace(case.loss, *case.shapes())
    with pytest.raises(UserError, match="a batch of 16 rows does not divide by data=3; nearest: 15 or 18"):
        space(program, Topology.parse("cpu:3"), Declared(mesh={"data": 3}))


def test_storage_is_replicated_zero_1_fsdp_and_both(program: Program) -> None:
    kinds = set()
    for layout in offered(program).layouts:
        if layout.mesh["tensor"] > 1:
            continue
        up = next(a.index for a in program.parameters if a.path == "layers/mlp/up")
        axes = {axis for entry in layout.stored[up] for axis in entry}
        moments = {axis for entry in layout.optimizer[up] for axis in entry}
        kinds.add((frozenset(axes), frozenset(moments)))
        # The stacked dimension is walked by the layer scan.
        assert layout.stored[up][0] == layout.optimizer[up][0] == ()
    none, data, fsdp = frozenset(), frozenset({"data"}), frozenset({"fsdp"})
    assert kinds == {(none, none), (none, data), (fsdp, fsdp), (fsdp, data | fsdp)}


def test_no_array_is_cut_in_parts_that_do_not_divide(program: Program) -> None:
    for topology in ("v5e:2x4", "cpu:6", "2*v5e:2x2"):
        for layout in offered(program, topology).layouts:
            for argument in program.parameters:
                for storage in (layout.stored[argument.index], layout.optimizer[argument.index]):
                    used = [axis for axes in storage for axis in axes]
                    assert len(used) == len(set(used))
                    for size, axes in zip(argument.shape, storage, strict=True):
                        assert size % math.prod(layout.mesh[axis] for axis in axes) == 0


def test_declared_rules_are_kept(program: Program) -> None:
    found = offered(program, rules={"mlp": None, "layers/attention/query": [None, "fsdp", "tensor"]})
    by_path = {argument.path: argument for argument in program.parameters}
    for layout in found.layouts:
        assert "mlp" not in {program.dims[dim].name for dim in layout.dims}
        assert layout.stored[by_path["layers/mlp/up"].index][2] == ()
        query = layout.stored[by_path["layers/attention/query"].index]
        wanted = [axis for axis in ("fsdp", "tensor") if layout.mesh[axis] > 1]
        assert [axis for axes in query for axis in axes] == wanted


def test_attention_has_a_way_over_context_wherever_it_is_cut(program: Program) -> None:
    """Also beside a stream between layers that lies over ``tensor`` too, as heads do then."""
    found = offered(program, mesh={"context": 2, "tensor": 4}).layouts
    assert {layout.context is None for layout in found} == {False}
    cut = {axes for layout in found for axes in layout.dims.values() if "context" in axes}
    assert cut == {("context",), ("context", "tensor")}


def test_a_declared_way_leaves_out_the_meshes_that_it_does_not_divide() -> None:
    long = {key: jax.ShapeDtypeStruct((4, 65536), jnp.int32) for key in BATCH}
    names = {0: MODEL.names, 1: dict.fromkeys(long, ("batch", "sequence"))}
    found = offered(trace(MODEL.loss, PARAMS, long, names=names), "cpu:32", context="heads")
    assert {layout.mesh["context"] for layout in found.layouts} == {2, 4, 8}
    assert found.refused["context=32"] == "context=32 does not divide 8 heads of queries; nearest: 8"


def test_a_declared_context_axis_shards_the_sequence(program: Program) -> None:
    for layout in offered(program, mesh={"context": 2}).layouts:
        assert layout.mesh["context"] == 2
        assert any("context" in axes for axes in layout.dims.values())


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"remat": "ful"}, "did you mean 'full'"),
        ({"microbatches": 0}, "microbatches=0 is no whole number"),
        ({"microbatches": 3}, "a batch of 16 rows does not divide"),
        ({"mesh": {"data": 8}, "microbatches": 4}, "data=8 x microbatches=4 = 32; nearest: 32 rows"),
        ({"mesh": {"stage": 4}}, "stage=4 is more than layers=2; nearest: 2"),
        ({"schedule": "gpipe"}, "schedule='gpipe' orders pipeline stages and the mesh declares none"),
        ({"mesh": {"stage": 2}, "schedule": "1f1"}, "did you mean '1f1b'"),
        ({"mesh": {"expert": 2}}, "rule experts"),
        (
            {"mesh": {"tensor": 2}, "rules": {"heads": "tensor", "kv_heads": None}},
            "rules .*heads.* differ",
        ),
        ({"rules": {"embed": "tenser"}}, "did you mean 'tensor'"),
        ({"rules": {"embed": ["tensor", "tensor"]}}, "twice"),
        ({"rules": {"widgets": "tensor"}}, "widgets"),
        ({"mesh": {"tensor": 8}, "rules": {"kv_heads": "tensor"}}, "does not divide"),
    ],
)
def test_contradictions_are_named(program: Program, declared: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        offered(program, **declared)


def test_a_sequence_that_context_does_not_divide_is_named_with_the_nearest() -> None:
    short = {key: jax.ShapeDtypeStruct((16, 6), jnp.int32) for key in BATCH}
    names = {0: MODEL.names, 1: dict.fromkeys(BATCH, ("batch", "sequence"))}
    said = r"(tokens|targets) \(16, 6\): context=4 does not divide sequence=6; nearest: 2, or sequence=4 or 8"
    with pytest.raises(UserError, match=said):
        offered(trace(MODEL.loss, PARAMS, short, names=names), mesh={"context": 4})


def test_a_batch_smaller_than_the_devices_still_runs_when_parameters_can_be_stored(program: Program) -> None:
    case = zoo.mlp()
    params, batch = case.shapes()
    few = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape[1:]), leaf.dtype), batch)
    found = space(trace(case.loss, params, few), Topology.parse("cpu:8"), Declared())
    assert {layout.mesh["data"] for layout in found.layouts} == {1}


def test_declared_stages_cut_the_layers(program: Program) -> None:
    layers = next(argument.dims[0][0] for argument in program.parameters if argument.path == "layers/mlp/up")
    found = offered(program, mesh={"stage": 2})
    assert {layout.dims[layers] for layout in found.layouts} == {("stage",)}
    assert {layout.schedule for layout in found.layouts} == {"1f1b", "delayed"}
    up = next(argument.index for argument in program.parameters if argument.path == "layers/mlp/up")
    assert all(layout.stored[up][0] == ("stage",) for layout in found.layouts)
    gpipe = offered(program, mesh={"stage": 2}, schedule="gpipe")
    assert {layout.schedule for layout in gpipe.layouts} == {"gpipe"}
