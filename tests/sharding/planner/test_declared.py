"""What a declared mesh and rules come to, and one sentence for each declaration that cannot hold."""

from __future__ import annotations

import ast
import re
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from meshwright.models import DecoderConfig, decoder
from meshwright.sharding import Plan, UserError, declare, plan

ROWS, SEQUENCE = 16, 8
DECODER = decoder(
    DecoderConfig(
        layers=2,
        embed=16,
        heads=4,
        kv_heads=2,
        head_dim=4,
        mlp=32,
        vocab=64,
        max_sequence=SEQUENCE,
        compute_dtype="float32",
    )
)
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def mlp_loss(params: Any, batch: Any) -> Any:
    hidden = jnp.tanh(batch["x"] @ params["up"] + params["bias"])
    return jnp.square(hidden @ params["down"] - batch["y"]).mean()


MLP_NAMES = {"up": ("embed", "mlp"), "bias": ("mlp",), "down": ("mlp", "embed")}


def shapes(**found: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in found.items()}


def declare_mlp(**changes: Any) -> Plan:
    given: dict[str, Any] = {
        "params": shapes(up=(8, 32), bias=(32,), down=(32, 8)),
        "batch": shapes(x=(ROWS, 8), y=(ROWS, 8)),
        "topology": "cpu:8",
        "mesh": MESH,
        "names": MLP_NAMES,
        "optimizer": optax.adam(1e-3),
    } | changes
    return declare(mlp_loss, given.pop("params"), given.pop("batch"), **given)


def declare_decoder(**changes: Any) -> Plan:
    given: dict[str, Any] = {
        "topology": "cpu:8",
        "mesh": MESH,
        "names": DECODER.names,
        "optimizer": optax.adam(1e-3),
    } | changes
    batch = {key: jax.ShapeDtypeStruct((ROWS, SEQUENCE), jnp.int32) for key in ("tokens", "targets")}
    return declare(DECODER.loss, jax.eval_shape(DECODER.init, jax.random.key(0)), batch, **given)


def test_a_plain_function_of_dictionaries() -> None:
    plan = declare_mlp()
    assert {path: row.spec for path, row in plan.params.items()} == {
        "bias": ("tensor",),
        "down": ("tensor", "fsdp"),
        "up": ("fsdp", "tensor"),
    }
    assert {path: row.spec for path, row in plan.batch.items()} == {
        "x": (("data", "fsdp"),),
        "y": (("data", "fsdp"),),
    }
    assert plan.params["up"].shape == (8, 32)
    assert plan.mesh == MESH
    # Stored over fsdp, the embedding is whole while computing: that axis holds different rows of the batch.
    axes = {(row.path, row.dimension): row.axes for row in plan.dims.values()}
    assert ("tensor",) in axes.values()
    assert ("data", "fsdp") in axes.values()
    assert all("fsdp" not in found for found in axes.values() if found != ("data", "fsdp"))


def test_a_decoder_by_default_rules() -> None:
    plan = declare_decoder()
    by_end = {path.split("layers/")[-1]: row for path, row in plan.params.items()}
    names = {
        jax.tree_util.keystr(keys, simple=True, separator="/"): dims
        for keys, dims in jax.tree_util.tree_leaves_with_path(
            DECODER.names, is_leaf=lambda node: isinstance(node, tuple)
        )
    }
    assert set(names) == set(plan.params)
    axis_of = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
    for path, row in plan.params.items():
        wanted = [axis_of.get(name) for name in names[path]]
        while wanted and wanted[-1] is None:
            wanted.pop()
        assert row.spec == tuple(wanted), (path, names[path])
    assert len(by_end) == len(plan.params)
    assert all(row.spec == (("data", "fsdp"),) for row in plan.batch.values())
    sizes = {(row.size, row.axes) for row in plan.dims.values()}
    assert {(ROWS, ("data", "fsdp")), (32, ("tensor",)), (16, ())} <= sizes
    assert plan.notes == ()


def test_what_a_device_holds() -> None:
    plan = declare_mlp()
    assert plan.bytes_per_device() == 4 * (8 * 32 // 4 + 32 // 2 + 32 * 8 // 4)
    assert plan.bytes_per_device("batch") == 4 * 2 * ROWS * 8 // 4


def test_an_axis_absorbs_the_rest_and_declared_rules_come_first() -> None:
    plan = declare_mlp(mesh={"fsdp": -1}, rules={"embed": None, "mlp": "fsdp"})
    assert plan.mesh == {"fsdp": 8}
    assert plan.params["up"].spec == (None, "fsdp")


def test_a_pattern_says_where_one_parameter_lies() -> None:
    plan = declare_mlp(rules={"*down": [["tensor", "fsdp"]]})
    assert plan.params["down"].spec == (("tensor", "fsdp"),)
    assert plan.params["up"].spec == ("fsdp", "tensor")
    assert declare_mlp(rules={"*down": PartitionSpec(("tensor", "fsdp"))}).params == plan.params


def test_numbers_of_numpys_are_python_s() -> None:
    plan = declare_mlp(mesh={"data": np.int64(2), "fsdp": np.int32(4)}, microbatches=np.int64(2))
    assert type(plan.mesh["data"]) is type(plan.microbatches) is int
    assert plan == declare_mlp(mesh={"data": 2, "fsdp": 4}, microbatches=2)


def test_without_names_only_the_batch_is_spread() -> None:
    plan = declare_mlp(mesh={"data": 8}, names=None)
    assert all(row.spec == () for row in plan.params.values())
    assert plan.batch["x"].spec == ("data",)


def test_single_arrays_for_parameters_and_batch() -> None:
    plan = declare(
        lambda w, x: jnp.square(x @ w).mean(),
        jax.ShapeDtypeStruct((8, 8), jnp.float32),
        jax.ShapeDtypeStruct((8, 8), jnp.float32),
        topology="cpu:4",
        mesh={"data": 2, "tensor": 2},
        names=("embed", "mlp"),
    )
    assert [row.spec for row in plan.params.values()] == [(None, "tensor")]
    assert [row.spec for row in plan.batch.values()] == [("data",)]


def test_defaults_that_yield_are_noted() -> None:
    plan = declare_mlp(
        params=shapes(up=(9, 32), bias=(32,), down=(32, 9), other=(8,)),
        batch=shapes(x=(ROWS, 9), y=(ROWS, 9)),
        names={**MLP_NAMES, "other": ("embed",)},
    )
    assert plan.params["up"].spec == (None, "tensor")
    (note,) = plan.notes
    assert "embed" in note
    assert "9" in note
    assert "up" in note
    assert "down" in note


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mesh": {"data": 3, "tensor": 2}}, r"data=3 x tensor=2"),
        ({"mesh": {"data": 2, "tensor": 2}}, "data=2 x tensor=2 is 4, but there are 8 devices"),
        ({"mesh": {"data": -1, "fsdp": -1}}, "only one axis can absorb the rest"),
        ({"mesh": {"data": 4, "tenser": 2}}, "'tenser' is not known; did you mean 'tensor'"),
        ({"mesh": {"data": 8, "tensor": 0}}, "tensor=0 is no axis size"),
        ({"rules": {"mlp": "tenser"}}, "rule mlp: the mesh has no axis 'tenser'; did you mean 'tensor'"),
        ({"rules": {"mpl": "tensor"}}, "rule mpl matches no dimension; did you mean 'mlp'"),
        ({"rules": {"*/upp": ["fsdp"]}}, "rule \\*/upp matches no array; known: bias, down, up"),
        ({"rules": {"embed": "tensor", "mlp": "tensor"}}, "tensor"),
        ({"rules": {"embed": ["fsdp", "fsdp"]}}, "rule embed uses fsdp twice in one array"),
        (
            {
                "params": shapes(up=(9, 32), bias=(32,), down=(32, 9)),
                "batch": shapes(x=(ROWS, 9), y=(ROWS, 9)),
                "rules": {"embed": "fsdp"},
            },
            "fsdp=2 does not divide embed=9; nearest: ",
        ),
        (
            {"batch": shapes(x=(18, 8), y=(18, 8))},
            "a batch of 18 rows does not divide by data=2 x fsdp=2 = 4; nearest: 16 or 20 rows",
        ),
        (
            {"microbatches": 3},
            "a batch of 16 rows does not divide by data=2 x fsdp=2 x microbatches=3 = 12; "
            "nearest: 12 or 24 rows, or microbatches=2 or 4",
        ),
        ({"microbatches": 0}, "microbatches=0 .* at least 1"),
        ({"remat": "dot"}, "remat='dot' is not a policy; did you mean 'dots'"),
        ({"schedule": "delayed"}, "schedule='delayed' orders pipeline stages and the mesh declares none"),
        ({"stage_remat": False}, "stage_remat=False is of pipeline stages and the mesh declares none"),
        (
            {"mesh": {"data": 4, "expert": 2}},
            "expert=2 shards nothing in this program; give it a rule.*no parameter with a matrix for each",
        ),
        ({"topology": "cpu"}, "cpu"),
        ({"topology": "v9p:4"}, "v9p"),
        ({"names": {"up": ("embed", "mlp", "heads")}}, "up"),
        (
            {"names": {"upp": ("embed", "mlp")}},
            "names are given at 'upp', where argument 0 has no array; did you mean 'up'",
        ),
    ],
)
def test_declarations_that_cannot_hold_are_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        declare_mlp(**changes)
    assert "\n" not in str(caught.value)


def test_experts_written_as_one_product_are_told_how_to_be_named() -> None:
    def loss(params: Any, batch: Any) -> Any:
        of_each = jnp.einsum("bd,edf->bef", batch["x"], params["wide"])
        weights = jax.nn.softmax(batch["x"] @ params["gate"])
        return jnp.mean(jnp.einsum("bef,efd,be->bd", jnp.tanh(of_each), params["back"], weights))

    params = shapes(gate=(8, 4), wide=(4, 8, 32), back=(4, 32, 8))
    declared = {"topology": "cpu:8", "mesh": {"data": 4, "expert": 2}, "optimizer": optax.sgd(0.1)}
    with pytest.raises(UserError, match="expert=2 shards nothing") as caught:
        declare(loss, params, shapes(x=(16, 8)), **declared)
    (written,) = re.findall(r"names=(\{.*\})", str(caught.value))
    made = declare(loss, params, shapes(x=(16, 8)), names=ast.literal_eval(written), **declared)
    assert made.params["back"].spec[0] == "expert"


@pytest.mark.devices(8)
@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_a_loss_may_take_its_rows_in_fewer_groups_than_devices(mesh: dict[str, int]) -> None:
    def loss(params, batch):
        groups = batch.reshape(4, 8, 16)
        return jnp.mean(jax.vmap(lambda rows: jnp.std(jnp.tanh(rows @ params), axis=0).mean())(groups))

    params, batch = (
        draws.normal(jax.random.key(0), (16, 16)),
        draws.normal(jax.random.key(1), (32, 16)),
    )
    made = declare(loss, params, batch, topology="cpu:8", mesh=mesh, names=("embed", "mlp"))
    assert any("takes its rows in 4 groups" in note for note in made.notes)
    found = jax.jit(jax.value_and_grad(made.apply(loss)))(params, batch)
    wanted = jax.jit(jax.value_and_grad(loss))(params, batch)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-6)


@pytest.mark.devices(8)
@pytest.mark.parametrize("mesh", [{"tensor": 8}, {"fsdp": 8}])
@pytest.mark.parametrize("rows", [1, None])
def test_one_row_and_a_batch_without_rows_lie_whole(mesh: dict[str, int], rows: int | None) -> None:
    def loss(params: Any, batch: Any) -> Any:
        x = batch.get("x", jnp.ones((1, 8)))
        return jnp.square(x @ params["up"] @ params["down"]).mean()

    params = {"up": np.ones((8, 32), "float32"), "down": np.ones((32, 8), "float32")}
    batch = {} if rows is None else {"x": np.ones((rows, 8), "float32")}
    names = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
    one = declare(loss, params, batch, topology="cpu:8", mesh=mesh, names=names)
    assert one.bytes_per_device() == 8 * 32 * 2 * 4 // 8
    repeated = "the batch has no rows to share out: every device along fsdp=8 does all its work"
    assert (repeated in one.notes) == ("fsdp" in mesh)
    np.testing.assert_allclose(jax.jit(one.apply(loss))(params, batch), loss(params, batch), rtol=1e-6)


def test_a_batch_of_no_rows_is_one_sentence() -> None:
    with pytest.raises(UserError, match="the batch has no rows"):
        declare_mlp(batch=shapes(x=(0, 8), y=(0, 8)))


def test_a_bias_of_rows_with_no_dimension_of_queries_lies_beside_a_sequence_over_context() -> None:
    """The second dimension of ``[batch, 1, 1, keys]`` is no sequence, which would have to divide by 8."""

    def biased(params: Any, batch: Any) -> Any:
        x, w = batch["x"] @ params["w"], params["w"]
        scores = jnp.einsum("bte,bse->bts", x, x @ w)[:, None] + batch["bias"]
        return jnp.square(jax.nn.softmax(scores)[:, 0] @ x).mean()

    params = {"w": jax.ShapeDtypeStruct((8, 8), "float32")}
    batch = {
        "x": jax.ShapeDtypeStruct((4, 32, 8), "float32"),
        "bias": jax.ShapeDtypeStruct((4, 1, 1, 32), "float32"),
    }
    plan = declare(biased, params, batch, topology="cpu:8", mesh={"context": 8})
    assert plan.batch["x"].spec[:2] == (None, "context")


def test_a_sequence_that_the_loss_takes_in_chunks_lies_over_context() -> None:
    def chunked(params: Any, batch: Any) -> Any:
        x = batch["x"] @ params["w"]
        # A loss in two chunks of each row.
        chunks = x.reshape(x.shape[0], -1, 2, x.shape[-1])
        return jax.lax.map(lambda one: (one**2).sum(), jnp.swapaxes(chunks, 0, 2)).mean()

    params = {"w": jax.ShapeDtypeStruct((16, 16), "float32")}
    batch = {"x": jax.ShapeDtypeStruct((8, 64, 16), "float32")}
    plan = declare(chunked, params, batch, topology="cpu:8", mesh={"context": 8})
    assert plan.batch["x"].spec[:2] == (None, "context")
    assert [dim.axes for dim in plan.dims.values() if dim.size == 32] == [("context",)]


@pytest.mark.parametrize("heads", [1, 4])
def test_a_bias_for_each_row_has_its_sequence_behind_the_heads(heads: int) -> None:
    """It stood for the heads, which an axis of the sequence did not divide, or cut."""
    weight = jax.ShapeDtypeStruct((8, 4, 8), jnp.float32)
    x = jax.ShapeDtypeStruct((8, 16, 8), jnp.float32)
    bias = jax.ShapeDtypeStruct((8, heads, 16, 16), jnp.float32)

    def loss(params: Any, batch: Any) -> Any:
        query, key = (jnp.einsum("bse,ehd->bshd", batch["x"], params[name]) for name in ("query", "key"))
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) + batch["bias"])
        return jnp.square(jnp.einsum("bhqk,bkhd->bqhd", scores, key)).mean()

    params, mesh = {"query": weight, "key": weight}, {"data": 4, "context": 2}
    plan = declare(loss, params, {"x": x, "bias": bias}, topology="cpu:8", mesh=mesh)
    assert plan.batch["x"].spec == ("data", "context")
    assert plan.batch["bias"].spec == ("data", None, "context")


def by_time(params: Any, batch: Any) -> Any:
    start = jnp.zeros_like(batch["y"])
    last, _ = jax.lax.scan(lambda h, x: (jnp.tanh(h @ params["w"] + x), None), start, batch["x"])
    return jnp.square(last - batch["y"]).mean()


def of_each_row(params: Any, batch: Any) -> Any:
    return jnp.square(batch["x"] @ params["w"] + params["own"][:, None]).mean()


@pytest.mark.parametrize(
    ("loss", "own", "batch", "sentence"),
    [
        (
            by_time,
            {},
            {"x": (6, ROWS, 8), "y": (ROWS, 8)},
            r"a batch of 6 rows does not divide by data=8; .*; x \(6, 16, 8\) is read as 6 rows, and y "
            r"\(16, 8\) leads with dimension 1 of it: rows come first in each array",
        ),
        (
            of_each_row,
            {"own": (ROWS,)},
            {"x": (ROWS, 8)},
            r"which data=8 could share out, since x \(16, 8\) has a row for each entry of parameter own "
            r"\(16,\): look those up by numbers that come with the rows",
        ),
    ],
    ids=["time first", "a parameter of each row"],
)
def test_a_batch_whose_rows_are_not_its_own_is_told_why(
    loss: Any, own: Any, batch: Any, sentence: str
) -> None:
    params = shapes(w=(8, 8), **own)
    with pytest.raises(UserError, match=sentence):
        declare(loss, params, shapes(**batch), topology="cpu:8", mesh={"data": 8})


def time_beside_rows(params: Any, batch: Any) -> Any:
    return jnp.square(jnp.swapaxes(batch["x"], 0, 1) @ params["w"] - batch["y"]).mean()


def in_turns(params: Any, batch: Any) -> Any:
    def turn(h: Any, x: Any) -> Any:
        h = jnp.tanh(h @ params["w"] + x)
        return h, h

    _, found = jax.lax.scan(turn, batch["h"], batch["x"])
    return jnp.square(found).mean()


TURNS = {"x": (32, ROWS, 8), "h": (ROWS, 8)}
TAKEN = "x (32, 16, 8) is read as 32 rows, which the loop at "


def test_a_declared_plan_notes_a_loop_that_takes_its_rows_in_turns() -> None:
    params, batch = shapes(w=(8, 8)), shapes(**TURNS)
    made = declare(in_turns, params, batch, topology="cpu:8", mesh={"data": 8})
    assert [note for note in made.notes if note.startswith(TAKEN) and "leads with dimension 1 of it" in note]

    def rows_first(params: Any, batch: Any) -> Any:
        return in_turns(params, {"h": batch["h"], "x": jnp.swapaxes(batch["x"], 0, 1)})

    batch = shapes(x=(ROWS, 32, 8), h=(ROWS, 8))
    made = declare(rows_first, params, batch, topology="cpu:8", mesh={"data": 8})
    assert not [note for note in made.notes if "one after another" in note]


@pytest.mark.parametrize(
    ("loss", "own", "batch", "sentence"),
    [
        (in_turns, {}, TURNS, TAKEN),
        (
            time_beside_rows,
            {},
            {"x": (32, ROWS, 8), "y": (ROWS, 32, 8)},
            "x (32, 16, 8) is read as 32 rows, and y (16, 32, 8) leads with dimension 1 of it: rows come",
        ),
        (
            of_each_row,
            {"own": (ROWS,)},
            {"x": (ROWS, 8)},
            "so that no axis shares them out: x (16, 8) has a row for each entry of parameter own (16,)",
        ),
    ],
    ids=["rows in turns", "time first", "a parameter of each row"],
)
def test_a_plan_notes_rows_that_are_not_the_batchs_own(
    loss: Any, own: Any, batch: Any, sentence: str
) -> None:
    made = plan(loss, shapes(w=(8, 8), **own), shapes(**batch), topology="cpu:8")
    assert [note for note in made.notes if sentence in note]
