"""Plans as files, plans against programs, and what a plan makes of an optimiser's state."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P
from meshwright.models import DecoderConfig, decoder
from meshwright.runtime.config import parse
from meshwright.runtime.train import optimizer
from meshwright.sharding import Plan, UserError, declare

MODEL_CONFIG = DecoderConfig(
    layers=2,
    embed=256,
    heads=4,
    kv_heads=2,
    head_dim=64,
    mlp=128,
    vocab=512,
    max_sequence=8,
    compute_dtype="float32",
)
MODEL = decoder(MODEL_CONFIG)
PARAMS = jax.eval_shape(MODEL.init, jax.random.key(0))
BATCH = {key: jax.ShapeDtypeStruct((8, 8), jnp.int32) for key in ("tokens", "targets")}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return declare(
        MODEL.loss,
        PARAMS,
        BATCH,
        topology="cpu:8",
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
        names=MODEL.names,
        remat="dots",
        microbatches=2,
    )


def by_path(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_a_plan_is_printed_as_a_line_and_its_topology_by_its_name(plan: Plan) -> None:
    assert str(plan.topology) in repr(plan)
    assert "microbatches=" in repr(plan)
    assert len(repr(plan)) < 300
    assert repr(plan.topology) == f"<Topology {plan.topology}>"


def test_saved_and_loaded_it_is_the_same_plan(plan: Plan, tmp_path: pathlib.Path) -> None:
    noted = dataclasses.replace(plan, notes=("embed stays whole in a: 9 does not divide",))
    for number, saved in enumerate((plan, noted)):
        path = tmp_path / f"{number}.json"
        saved.save(path)
        assert Plan.load(path) == saved
        assert isinstance(json.loads(path.read_text()), dict)


def test_a_file_has_a_line_for_each_array(plan: Plan, tmp_path: pathlib.Path) -> None:
    plan.save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    for name in (*plan.params, *plan.batch, *plan.dims):
        assert sum(line.startswith(f"    {json.dumps(name)}: ") for line in lines) == 1, name


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not a plan"),
        (b"[1, 2]", "is not a plan"),
        (b'"plan"', "is not a plan"),
        (b'{"format": 1', "is not a plan"),
        (b"\xff\xfe\x00", "is not a plan"),
        (b'{"format": 99}', "format 99; this version reads format 1"),
        (b'{"version": 3, "name": "other"}', "format None; this version reads format 1"),
        (b'{"format": 1, "topology": "cpu:8"}', "is not a plan"),
    ],
)
def test_files_that_are_no_plans_are_one_sentence(
    content: bytes, sentence: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_one_sentence(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"no plan file .*plan\.json"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(UserError, match="is not a plan"):
        Plan.load(tmp_path)


def edited(plan: Plan, tmp_path: pathlib.Path, change: Any) -> pathlib.Path:
    record = json.loads(json.dumps(plan.to_dict()))
    change(record)
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r.update(remats="full"), "remats"),
        (lambda r: r["batch"]["tokens"].update(spec=["dta"]), "'tokens' .*'dta'.* did you mean 'data'"),
        (lambda r: r["batch"]["tokens"].update(spec=[None, None, "data"]), "'tokens'"),
        (lambda r: r["batch"]["tokens"].update(spec=["data", "data"]), "'tokens'.*data twice"),
        (lambda r: r["batch"]["tokens"].update(shape=[9, 8]), "'tokens'.* 9"),
        (
            lambda r: next(iter(r["dims"].values())).update(axes=["tenser"]),
            "'tenser'.* did you mean 'tensor'",
        ),
        (lambda r: r.update(microbatches=0), "microbatches=0"),
        (lambda r: r.update(remat="some"), "remat='some' is not a policy"),
    ],
)
def test_plans_edited_by_hand_are_checked(
    plan: Plan, change: Any, sentence: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        Plan.load(edited(plan, tmp_path, change))
    assert "\n" not in str(caught.value)


def test_check_names_what_differs(plan: Plan) -> None:
    plan.check(PARAMS, BATCH)
    with pytest.raises(UserError, match="has a batch array 'targets' that the program lacks"):
        plan.check(PARAMS, {"tokens": BATCH["tokens"]})
    extra = {**BATCH, "position": BATCH["tokens"]}
    with pytest.raises(UserError, match="the program has a batch array 'position' that the plan lacks"):
        plan.check(PARAMS, extra)
    short = {**BATCH, "tokens": jax.ShapeDtypeStruct((4, 8), jnp.int32)}
    with pytest.raises(UserError, match=r"batch array 'tokens' has shape \(4, 8\);.* for \(8, 8\)"):
        plan.check(PARAMS, short)
    without = {key: value for key, value in PARAMS.items() if key != "layers"}
    with pytest.raises(UserError, match=r"has a parameter 'layers/.*' that the program lacks"):
        plan.check(without, BATCH)
    wider = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leaf.shape, 1), leaf.dtype), PARAMS)
    with pytest.raises(UserError, match=r"parameter '.*' has shape \(.*, 1\); the plan was made for"):
        plan.check(wider, BATCH)


def test_specs_of_another_shape_are_refused(plan: Plan) -> None:
    wider = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leaf.shape, 1), leaf.dtype), PARAMS)
    with pytest.raises(UserError, match=r"has shape .* the plan was made for"):
        plan.specs(wider)


def test_parameters_and_batch_may_share_a_name() -> None:
    shapes = {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    plan = declare(
        lambda params, batch: jnp.square(batch["x"] @ params["x"]).mean(),
        shapes,
        shapes,
        topology="cpu:4",
        mesh={"data": 2, "tensor": 2},
        names={"x": ("embed", "mlp")},
    )
    assert plan.specs(shapes)["x"] == P(None, "tensor")
    assert plan.specs(shapes, "batch")["x"] == P("data")


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_moments_lie_as_their_parameters(plan: Plan, name: str) -> None:
    config = parse({"optimizer": {"name": name}}).optimizer
    state = jax.eval_shape(optimizer.build(config, lambda _: 1e-3, MODEL.names).init, PARAMS)
    specs = by_path(plan.specs(state))
    moments = 0
    for path, leaf in by_path(state).items():
        owners = [own for own in plan.params if path.endswith(f"/{own}")]
        if not owners:
            assert leaf.size <= 4  # counters and constants
            assert specs[path] == P()
            continue
        owner = max(owners, key=len)
        assert leaf.shape == plan.params[owner].shape
        assert specs[path] == P(*plan.params[owner].spec), path
        moments += 1
    assert moments >= len(plan.params)


def test_factored_moments_keep_what_is_left_of_the_spec(plan: Plan) -> None:
    config = parse({"optimizer": {"name": "adafactor"}}).optimizer
    state = jax.eval_shape(optimizer.build(config, lambda _: 1e-3, MODEL.names).init, PARAMS)
    specs, found = by_path(plan.specs(state)), by_path(state)
    table = next(path for path, row in plan.params.items() if row.shape == (512, 256))
    assert plan.params[table].spec == ("tensor", "fsdp")
    factors = {
        leaf.shape: specs[path] for path, leaf in found.items() if path.endswith(table) and leaf.size > 1
    }
    assert factors == {(512,): P("tensor"), (256,): P("fsdp")}
    for path, leaf in found.items():
        parts = [plan.mesh[axis] for entry in specs[path] if entry for axis in jax.tree.leaves(entry)]
        assert len(specs[path]) <= leaf.ndim
        assert leaf.ndim or not parts


@pytest.mark.devices(8)
def test_an_optimiser_of_every_kind_starts_sharded(plan: Plan) -> None:
    mesh = plan.make_mesh()
    for made in (optax.adamw(1e-3), optax.adafactor(1e-3), optax.sgd(1e-3, momentum=0.9)):
        state = jax.eval_shape(made.init, PARAMS)
        shardings = plan.shardings(state, mesh)
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
            assert sharding.shard_shape(leaf.shape) is not None


def test_a_layout_holds_for_fewer_layers(plan: Plan) -> None:
    fewer = decoder(dataclasses.replace(MODEL_CONFIG, layers=1))
    params = jax.eval_shape(fewer.init, jax.random.key(0))
    small = plan.resized(params, BATCH)
    small.check(params, BATCH)
    assert small.specs(params) == plan.specs(PARAMS)
    assert (small.mesh, small.remat, small.microbatches) == (plan.mesh, plan.remat, plan.microbatches)
    one_row = {key: jax.ShapeDtypeStruct((1, 8), jnp.int32) for key in BATCH}
    with pytest.raises(UserError, match="does not divide a dimension of size 1"):
        plan.resized(params, one_row)
    with pytest.raises(UserError, match="that the program lacks"):
        plan.resized(params, {"tokens": BATCH["tokens"]})
