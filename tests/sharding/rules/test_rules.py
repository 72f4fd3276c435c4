from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshwright.sharding import Rules, UserError, make_mesh
from meshwright.sharding.rules.rules import DEFAULT_RULES

MESH = {"data": 1, "fsdp": 4, "tensor": 2}
NAMES = {
    "embed": {"table": ("vocab", "embed")},
    "layers": {
        "wq": ("layers", "embed", "heads", "head_dim"),
        "wk": ("layers", "embed", "kv_heads", "head_dim"),
        "up": ("layers", "embed", "mlp"),
        "scale": ("layers", "embed"),
    },
}
SHAPES = {
    "embed": {"table": (96, 32)},
    "layers": {"wq": (3, 32, 4, 8), "wk": (3, 32, 1, 8), "up": (3, 32, 64), "scale": (3, 32)},
}


def params():
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def test_dimensions_and_paths():
    rules = Rules({"embed": "fsdp", "mlp": ["tensor"], "embed/table": ["tensor", "fsdp"]})
    specs = rules.specs(params(), MESH, NAMES)
    assert specs == {
        "embed": {"table": P("tensor", "fsdp")},
        "layers": {
            "wq": P(None, "fsdp"),
            "wk": P(None, "fsdp"),
            "up": P(None, "fsdp", "tensor"),
            "scale": P(None, "fsdp"),
        },
    }


def test_a_path_beats_a_dimension_and_the_closest_path_wins():
    rules = Rules(
        {"embed": "fsdp", "*": None, "layers/*": [None, "tensor"], "layers/up": [None, ["fsdp", "tensor"]]}
    )
    specs = rules.specs(params(), MESH, NAMES)
    assert specs["embed"]["table"] == P()
    assert specs["layers"]["wq"] == P(None, "tensor")
    assert specs["layers"]["up"] == P(None, ("fsdp", "tensor"))


def test_paths_need_no_names():
    specs = Rules({"embed/table": ["tensor", "fsdp"]}).specs(params(), MESH)
    assert specs["embed"]["table"] == P("tensor", "fsdp")
    assert specs["layers"]["up"] == P()


@pytest.mark.parametrize(
    "optimizer", [optax.adamw(1e-3), optax.lion(1e-3), optax.chain(optax.clip(1.0), optax.sgd(1e-3, 0.9))]
)
def test_optimizer_state_follows_the_parameters(optimizer):
    rules = Rules({"embed/table": ["tensor", "fsdp"]}).with_defaults()
    state = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "params": params(),
        "optimizer": jax.eval_shape(optimizer.init, params()),
    }
    specs = rules.specs(state, MESH, NAMES)
    of_params = jax.tree.leaves(specs["params"], is_leaf=lambda node: isinstance(node, P))
    of_optimizer = jax.tree.leaves(specs["optimizer"], is_leaf=lambda node: isinstance(node, P))
    moments = [spec for spec in of_optimizer if spec != P()]
    assert moments == of_params * (len(moments) // len(of_params))
    assert len(moments) >= len(of_params)
    assert jax.tree.structure(specs) == jax.tree.structure(state)


def test_factored_optimizer_state_stays_whole_and_says_so():
    optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=8)
    state = jax.eval_shape(optimizer.init, params())
    rules = Rules({"embed/table": ["tensor", "fsdp"]}).with_defaults()
    specs = rules.specs(state, MESH, NAMES)
    assert all(
        len(spec) <= len(leaf.shape)
        for spec, leaf in zip(
            jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, P)),
            jax.tree.leaves(state),
            strict=True,
        )
    )
    notes = rules.notes(state, MESH, NAMES)
    assert any("its rank is not its parameter's" in note and "v_row" in note for note in notes)
    assert any("its rank is below that of rule embed/table" in note for note in notes)


@pytest.mark.devices(8)
def test_shardings_place_real_arrays():
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    placed = jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params()),
        out_shardings=DEFAULT_RULES.shardings(params(), mesh, NAMES),
    )()
    assert placed["layers"]["up"].addressable_shards[0].data.shape == (3, 8, 32)
    assert placed["embed"]["table"].addressable_shards[0].data.shape == (48, 8)
    assert isinstance(placed["layers"]["wk"].sharding, NamedSharding)


@pytest.mark.devices(8)
def test_flax_state():
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.up = nnx.Linear(8, 16, rngs=rngs)

    state = nnx.state(Model(nnx.Rngs(0)))
    names = {"up": {"kernel": ("embed", "mlp"), "bias": ("mlp",)}}
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    shardings = Rules({"embed": "fsdp", "up/bias": ["tensor"]}).shardings(state, mesh, names)
    placed = jax.device_put(state, shardings)
    leaves = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(placed)}
    assert leaves == {(8, 16): P("fsdp"), (16,): P("tensor")}


def test_defaults_yield_and_say_so():
    specs = DEFAULT_RULES.specs(params(), {"fsdp": 4, "tensor": 2}, NAMES)
    assert specs["layers"]["wq"] == P(None, "fsdp", "tensor")
    assert specs["layers"]["wk"] == P(None, "fsdp")
    notes = DEFAULT_RULES.notes(params(), {"fsdp": 4, "tensor": 2}, NAMES)
    assert notes == ["kv_heads=1 stays whole in layers/wk: tensor=2 does not divide it"]
    assert DEFAULT_RULES.specs(params(), {"data": 8}, NAMES)["layers"]["wq"] == P()
    assert DEFAULT_RULES.notes(params(), {"data": 8}, NAMES) == []


def test_a_default_yields_to_a_declared_rule():
    rules = Rules({"embed": "tensor"}).with_defaults()
    assert rules.specs(params(), MESH, NAMES)["layers"]["up"] == P(None, "tensor")
    assert "mlp=64 stays whole in layers/up: embed already uses tensor" in rules.notes(params(), MESH, NAMES)


def test_the_batch():
    assert DEFAULT_RULES.spec(("batch", "sequence"), (8, 64), {"data": 2, "fsdp": 4}) == P(("data", "fsdp"))
    assert DEFAULT_RULES.spec(("batch", "sequence"), (8, 64), {"data": 2, "context": 4}) == P(
        "data", "context"
    )
    with pytest.raises(UserError, match="data=2 x fsdp=4 = 8 does not divide batch=12; nearest: 6 or 12"):
        DEFAULT_RULES.spec(("batch", "sequence"), (12, 64), {"data": 2, "fsdp": 4})


def test_idle_axes():
    assert Rules({"embed": "fsdp"}).idle_axes({"fsdp": 4, "tensor": 2, "data": 1}) == ("tensor",)
    assert DEFAULT_RULES.idle_axes({"data": 2, "stage": 2}) == ("stage",)


@pytest.mark.parametrize(
    ("declared", "mesh", "message"),
    [
        ({"heads": "tensor"}, {"tensor": 3}, "layers/wq: tensor=3 does not divide heads=4; nearest: 2 or 4"),
        ({"kv_heads": "tensor"}, MESH, "layers/wk: tensor=2 does not divide kv_heads=1; nearest: 1"),
        ({"embed": "fdsp"}, MESH, "rule embed: the mesh has no axis 'fdsp'; did you mean 'fsdp'?"),
        ({"experts": "expert"}, MESH, "rule experts: the mesh has no axis 'expert'; known: data, fsdp"),
        ({"embd": "fsdp"}, MESH, "rule embd matches no dimension; did you mean 'embed'?"),
        ({"experts": "fsdp"}, MESH, "rule experts matches no dimension"),
        ({"embed/tabel": ["fsdp"]}, MESH, "rule embed/tabel matches no array; did you mean 'embed/table'?"),
        (
            {"embed": "fsdp", "mlp": "fsdp"},
            MESH,
            "layers/up: embed and mlp both claim fsdp in one array; give the array a rule of its own, "
            "such as layers/up: [null, fsdp, null]",
        ),
        ({"embed/table": ["fsdp", "fsdp"]}, MESH, "rule embed/table uses fsdp twice in one array"),
        ({"batch": ["data", "data"]}, MESH, "rule batch uses data twice in one array"),
        (
            {"layers/scale": [None, None, "fsdp"]},
            MESH,
            "rule layers/scale has 3 entries, but layers/scale has shape (3, 32); give at most 2",
        ),
        (
            {"embed/table": [["fsdp", "tensor"]]},
            {"fsdp": 5, "tensor": 2},
            "embed/table: fsdp=5 x tensor=2 = 10 does not divide vocab=96; nearest: 8 or 12",
        ),
        (
            {"embed/table": "fsdp"},
            MESH,
            "rule embed/table: 'fsdp' is no list with an entry for each dimension; write [fsdp]",
        ),
        ({"embed": 3}, MESH, "rule embed: 3 is none of an axis"),
        ({"w": [None, "tensor"]}, MESH, "dimension. For arrays whose path ends so write '*w'"),
        ({"layers/*": ["fsdp"], "*/wq": ["tensor"], "*yers/*": None}, {"fsdp": 3, "tensor": 1}, None),
        (
            {"l*/wq": None, "*s/wq": [None, "fsdp"]},
            MESH,
            "rules l*/wq and *s/wq both match layers/wq; make one of them more specific",
        ),
    ],
)  # fmt: skip
def test_mistakes(declared, mesh, message):
    if message is None:
        Rules(declared).specs(params(), mesh, NAMES)
        return
    with pytest.raises(UserError, match=re.escape(message)):
        Rules(declared).specs(params(), mesh, NAMES)


def test_mistakes_about_names():
    with pytest.raises(
        UserError, match="rule embed is for a named dimension, but these arrays have no names"
    ):
        Rules({"embed": "fsdp"}).specs(params(), MESH)
    with pytest.raises(
        UserError, match=r"names has 'embed/tabel', which no array has; did you mean 'embed/table'\?"
    ):
        Rules({}).specs(params(), MESH, {"embed": {"tabel": ("vocab", "embed")}})
    with pytest.raises(UserError, match=r"embed/table: 1 dimension names \(vocab\) for shape \(96, 32\)"):
        Rules({}).specs(params(), MESH, {"embed": {"table": ("vocab",)}})
    with pytest.raises(UserError, match="2 dimension names"):
        Rules({}).spec(("batch", "sequence"), (8,), MESH)


def test_part_of_a_tree():
    only = {"embed": params()["embed"]}
    rules = Rules({"embed": "fsdp", "layers/up": [None, "fsdp"]})
    assert rules.specs(only, MESH, NAMES, partial=True)["embed"]["table"] == P(None, "fsdp")
    with pytest.raises(UserError):
        rules.specs(only, MESH, NAMES)


def test_counters_and_stand_ins_stay_whole():
    bias = {"bias": jax.ShapeDtypeStruct((32,), jnp.float32)}
    state = jax.eval_shape(optax.adafactor(1e-3).init, bias)
    specs = Rules({"embed": "fsdp", "*": ["fsdp"]}).specs(state, MESH, {"bias": ("embed",)})
    by_shape = dict(
        zip(
            [leaf.shape for leaf in jax.tree.leaves(state)],
            jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, P)),
            strict=True,
        )
    )
    assert by_shape == {(): P(), (1,): P(), (32,): P("fsdp")}
