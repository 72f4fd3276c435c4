"""Declared meshes over parameters without names: in parts by the trace, or one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshwright.sharding import Plan, UserError, declare, plan

VOCAB, EMBED, MLP, ROWS = 64, 32, 128, 16


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


PARAMS = {
    "table": shape(VOCAB, EMBED),
    "up": shape(EMBED, MLP),
    "bias": shape(MLP),
    "down": shape(MLP, EMBED),
}
NAMES: dict[str, tuple[str | None, ...]] = {
    "table": ("vocab", "embed"),
    "up": ("embed", "mlp"),
    "bias": ("mlp",),
    "down": ("mlp", "embed"),
}
IDS = jax.ShapeDtypeStruct((ROWS,), jnp.int32)


def loss(params: Any, ids: Any) -> Any:
    hidden = jnp.tanh(params["table"][ids] @ params["up"] + params["bias"])
    return jnp.square(hidden @ params["down"]).mean()


def declared(names: Any = None, rules: Any = None, **mesh: int) -> Plan:
    return declare(loss, PARAMS, IDS, topology="cpu:8", mesh=mesh, names=names, rules=rules)


def renamed(**words: str) -> dict[str, tuple[str | None, ...]]:
    return {path: tuple(words.get(name or "", name) for name in names) for path, names in NAMES.items()}


@pytest.mark.parametrize(
    "names",
    [
        None,
        dict.fromkeys(PARAMS),
        renamed(vocab="V", embed="D", mlp="F"),
        renamed(embed="embd"),
        {"table": NAMES["table"]},
    ],
    ids=["none", "empty", "foreign", "misspelt", "forgotten"],
)
def test_parameters_that_no_rule_knows_are_cut_by_the_trace(names: Any) -> None:
    made = declared(names, fsdp=4, tensor=2)
    by_name = declared(NAMES, fsdp=4, tensor=2)
    least = 2 if names and len(names) == 1 else 1
    assert made.bytes_per_device() <= least * by_name.bytes_per_device()
    assert all(any(row.spec) for row in made.params.values())


def test_one_axis_alone_cuts_every_parameter() -> None:
    for axis in ("fsdp", "tensor"):
        made = declared(**{axis: 8})
        assert made.bytes_per_device() * 8 == sum(4 * row.size for row in PARAMS.values())
    assert declared(data=8).specs(PARAMS) == dict.fromkeys(PARAMS, P())


def test_what_rules_say_is_kept() -> None:
    assert declared(rules={"*up": [None, "fsdp"]}, fsdp=8).specs(PARAMS)["up"] == P(None, "fsdp")
    assert declared(rules={"*table": None}, fsdp=8).specs(PARAMS)["table"] == P()
    # Asked for in so many words, all may lie whole.
    assert not any(row.spec for row in declared(NAMES, {"embed": None}, fsdp=8).params.values())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: declared(
                {path: (None,) * len(row.shape) for path, row in PARAMS.items()} | NAMES, expert=8
            ),
            "expert=8 shards nothing",
        ),
        (
            lambda: declared({**renamed(embed="mlp"), "table": ("vocab", None)}, {"mlp": None}, fsdp=8),
            "fsdp=8 shards no parameter, .*: the rule embed is for a dimension that no parameter has",
        ),
        (
            lambda: declare(
                lambda w, x: (x @ w).mean(), shape(63, 65), shape(16, 63), topology="cpu:8", mesh={"fsdp": 8}
            ),
            r"it divides none of their dimensions \(the parameter is \(63, 65\); nearest: 5 or 13\)",
        ),
        (
            lambda: declare(
                lambda t, x: (x * t).mean(), shape(), shape(16, 63), topology="cpu:8", mesh={"fsdp": 8}
            ),
            "fsdp=8 shards no parameter, .*: the parameter is a single number, which no axis cuts; ",
        ),
    ],
)
def test_an_axis_that_shards_no_parameter_is_one_sentence(make: Callable[[], Plan], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


@pytest.mark.parametrize(
    ("sizes", "mesh", "said"),
    [
        (
            (63, 65),
            {"fsdp": 8},
            r"^mesh axis fsdp=8 shards no parameter, .*\(63, 65\); nearest: 5 or 13\);",
        ),
        ((63, 65), {"fsdp": -1}, r"^mesh axis fsdp=8 shards no parameter, .*"),
        ((63, 66), {"fsdp": 4, "tensor": 2}, r"^mesh axis fsdp=4 shards no parameter, .*"),
        ((63, 65), {"fsdp": 2}, r"no layout .*: mesh axis fsdp=2 shards no parameter, .*"),
    ],
)
def test_a_search_refuses_an_axis_that_was_declared_and_shards_no_parameter(
    sizes: tuple[int, int], mesh: dict[str, int], said: str
) -> None:
    def make(**declared: Any) -> Plan:
        return plan(lambda w, x: (x @ w).mean(), shape(*sizes), shape(16, 63), topology="cpu:8", **declared)

    with pytest.raises(UserError, match=said):
        make(mesh=mesh)
    # Not declared, or with a dimension for it, or whole because a rule says so.
    assert make().mesh
    assert make(mesh={"data": 8}).mesh["data"] == 8
    whole = {"embed": None, "mlp": None, "vocab": None}
    kept = plan(loss, PARAMS, IDS, topology="cpu:8", mesh={"fsdp": 8}, names=NAMES, rules=whole)
    assert not any(row.spec for row in kept.params.values())


def test_what_lies_whole_though_it_matters_is_noted() -> None:
    params = {**PARAMS, "odd": shape(33, 35)}

    def one(params: Any, ids: Any) -> Any:
        return loss(params, ids) + jnp.square(params["odd"]).sum()

    made = declare(one, params, IDS, topology="cpu:8", mesh={"fsdp": 8}, names={**NAMES, "odd": (None, None)})
    assert [note for note in made.notes if note.startswith("odd (33, 35) lies whole on every device")]


def test_captured_arrays_are_counted_and_noted() -> None:
    base = jnp.ones((1024, EMBED))

    @jax.jit
    def frozen(x: Any) -> Any:
        return x @ base.T

    def one(params: Any, ids: Any) -> Any:
        return loss(params, ids) + frozen(params["table"][ids]).mean()

    made = plan(one, PARAMS, IDS, topology="v5e:2x4", mesh={"data": 8})
    plain = plan(loss, PARAMS, IDS, topology="v5e:2x4", mesh={"data": 8})
    assert made.estimate is not None
    assert plain.estimate is not None
    assert made.estimate.memory["captured"] == base.nbytes
    assert "captured" not in plain.estimate.memory
    small = declare(one, PARAMS, IDS, topology="cpu:8", mesh={"data": 8})
    (note,) = [note for note in small.notes if "captures" in note]
    assert note.startswith("the loss captures an array (1024, 32) of float32 (")
    assert "test_unnamed.py" in note


@pytest.mark.devices(8)
def test_an_axis_that_the_losss_own_regions_cut_over_shards_something() -> None:
    def loss(params: Any, batch: Any) -> Any:
        mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        region = jax.shard_map(
            lambda w, v, x: jax.lax.psum(jnp.tanh(x @ w) @ v, "tensor"),
            mesh=mesh,
            in_specs=(P(None, "tensor"), P("tensor"), P("data")),
            out_specs=P("data"),
        )
        return jnp.square(region(params["w"], params["v"], batch["x"])).mean()

    params = {"w": shape(8, 32), "v": shape(32, 8)}
    batch = {"x": shape(16, 8)}
    made = declare(loss, params, batch, topology="cpu:8", mesh={"data": 4, "tensor": 2})
    assert made.mesh == {"data": 4, "tensor": 2}
    with pytest.raises(UserError, match="cut arrays over tensor=2; say tensor=2, or make their mesh so"):
        declare(loss, params, batch, topology="cpu:8", mesh={"data": 2, "tensor": 4})
