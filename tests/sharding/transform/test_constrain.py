"""A function worked through as planned gives the loss and the gradients that it gives unsharded."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from meshwright.models import DecoderConfig, Model, decoder
from meshwright.sharding import Plan, declare
from meshwright.sharding.hlo.replica_groups import axes_of_groups
from meshwright.sharding.hlo.text import parse_hlo

pytestmark = pytest.mark.numerics

# Of the arrays only activations have sizes that are no powers of 2.
ROWS, SEQUENCE, VOCAB = 32, 12, 64
MESHES = {
    "fsdp 8": {"fsdp": 8, "tensor": 1},
    "data 8": {"data": 8},
    "data 4 x tensor 2": {"data": 4, "tensor": 2},
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}


@functools.cache
def model() -> Model:
    return decoder(
        DecoderConfig(
            layers=2,
            embed=32,
            heads=4,
            kv_heads=2,
            head_dim=8,
            mlp=64,
            vocab=VOCAB,
            max_sequence=SEQUENCE,
            compute_dtype="float32",
        )
    )


def text(rows: int = ROWS) -> dict[str, Any]:
    """Packed rows: two documents and padding in each, a different share of it from row to row."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, VOCAB, (rows, SEQUENCE + 1), dtype=np.int32)
    lengths = random.integers(6, SEQUENCE + 1, (rows, 1))
    places = np.arange(SEQUENCE)[None]
    segments = np.where(places < 5, 1, 2) * (places < lengths)
    return {
        "tokens": tokens[:, :-1],
        "targets": np.where(places == 4, -1, tokens[:, 1:]).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "positions": np.where(places < 5, places, places - 5).repeat(rows, 0).astype(np.int32),
    }


def stacked_loss(params: Any, batch: Any) -> Any:
    """Two layers scanned over stacked weights, and a table to look rows up in."""

    def layer(x: Any, weights: Any) -> tuple[Any, None]:
        return x + jnp.tanh(x @ weights["up"] + weights["bias"]) @ weights["down"], None

    x, _ = jax.lax.scan(layer, params["table"][batch["index"]], params["layers"])
    error = jnp.square(x - batch["y"]).mean(-1) * batch["weight"]
    return error.sum() / batch["weight"].sum(), {"weight": batch["weight"].sum()}


STACKED_NAMES = {
    "table": ("vocab", "embed"),
    "layers": {
        "up": ("layers", "embed", "mlp"),
        "bias": ("layers", "mlp"),
        "down": ("layers", "mlp", "embed"),
    },
}


def stacked_params() -> Any:
    random = np.random.default_rng(1)
    shapes = {"table": (64, 16), "layers": {"up": (3, 16, 32), "bias": (3, 32), "down": (3, 32, 16)}}
    return jax.tree.map(
        lambda shape: random.normal(0, 0.3, shape).astype(np.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def stacked_batch() -> dict[str, Any]:
    random = np.random.default_rng(2)
    return {
        "index": random.integers(0, 64, (ROWS,), dtype=np.int32),
        "y": random.normal(size=(ROWS, 16)).astype(np.float32),
        "weight": random.integers(0, 3, (ROWS,)).astype(np.float32),
    }


def flat_loss(params: Any, batch: Any) -> Any:
    """Without scans, names or aux values; the output layer is the table again."""
    hidden = jax.nn.gelu(batch["x"] @ params["up"])
    scores = jax.nn.log_softmax(hidden @ params["down"] @ params["up"])
    return -jnp.take_along_axis(scores, batch["label"][:, None], -1).mean()


def flat_case() -> tuple[Any, Any]:
    random = np.random.default_rng(3)
    params = {
        "up": random.normal(0, 0.3, (16, 32)).astype(np.float32),
        "down": random.normal(0, 0.3, (32, 16)).astype(np.float32),
    }
    batch = {
        "x": random.normal(size=(ROWS, 16)).astype(np.float32),
        "label": random.integers(0, 32, (ROWS,), dtype=np.int32),
    }
    return params, batch


@functools.cache
def decoder_params() -> Any:
    return jax.tree.map(np.asarray, jax.device_get(jax.jit(model().init)(jax.random.key(0))))


def value_and_gradients(loss: Any, params: Any, batch: Any) -> tuple[float, Any]:
    def scalar(params: Any, batch: Any) -> Any:
        result = loss(params, batch)
        return result[0] if isinstance(result, tuple) else result

    value, gradients = jax.jit(jax.value_and_grad(scalar))(params, batch)
    return float(value), jax.device_get(gradients)


@functools.cache
def unsharded_decoder() -> tuple[float, Any]:
    return value_and_gradients(model().loss, decoder_params(), text())


def assert_same(got: tuple[float, Any], expected: tuple[float, Any]) -> None:
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    for (path, mine), reference in zip(
        jax.tree_util.tree_leaves_with_path(got[1]), jax.tree.leaves(expected[1]), strict=True
    ):
        assert np.abs(reference).max() > 0
        np.testing.assert_allclose(
            mine, reference, rtol=0, atol=1e-5 * np.abs(reference).max(), err_msg=jax.tree_util.keystr(path)
        )


def planned(
    loss: Any, params: Any, batch: Any, names: Any, mesh_axes: dict[str, int], **how: Any
) -> tuple[Plan, Any, Any, Any]:
    """Plan, the loss as planned, and the arrays where the plan wants them."""
    plan = declare(loss, params, batch, topology="cpu:8", mesh=mesh_axes, names=names, **how)
    mesh = plan.make_mesh()
    placed = place(params, plan.shardings(params, mesh))
    return plan, plan.apply(loss, mesh), placed, place(batch, plan.shardings(batch, mesh, "batch"))


def place(tree: Any, shardings: Any) -> Any:
    """Put arrays that every process has onto the devices of all."""
    return jax.tree.map(
        lambda leaf, to: jax.make_array_from_callback(leaf.shape, to, lambda index: leaf[index]),
        tree,
        shardings,
    )


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("mesh", "remat", "microbatches"),
    [
        pytest.param("fsdp 8", "none", 1, marks=pytest.mark.slow),
        ("fsdp 8", "full", 4),
        pytest.param("data 8", "dots", 4, marks=pytest.mark.slow),
        pytest.param("data 4 x tensor 2", "full", 1, marks=pytest.mark.slow),
        pytest.param("fsdp 4 x tensor 2", "dots", 1, marks=pytest.mark.slow),
        ("data 2 x fsdp 2 x tensor 2", "none", 4),
    ],
)
def test_a_decoder(mesh: str, remat: str, microbatches: int) -> None:
    batch = text()
    _, loss, params, placed = planned(
        model().loss,
        decoder_params(),
        batch,
        model().names,
        MESHES[mesh],
        remat=remat,
        microbatches=microbatches,
    )
    assert_same(value_and_gradients(loss, params, placed), unsharded_decoder())


COMBINED = [
    (mesh, remat, microbatches)
    for mesh in ("fsdp 8", "data 4 x tensor 2", "data 2 x fsdp 2 x tensor 2")
    for remat in ("none", "dots", "full")
    for microbatches in (1, 4)
]


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("mesh", "remat", "microbatches"),
    # Every second one by default: each mesh with each policy and each number of parts, if not all three.
    [
        pytest.param(*case, marks=[pytest.mark.slow] if n % 4 in (0, 3) else [])
        for n, case in enumerate(COMBINED)
    ],
)
def test_a_plain_function_with_a_scan(mesh: str, remat: str, microbatches: int) -> None:
    params, batch = stacked_params(), stacked_batch()
    expected = value_and_gradients(stacked_loss, params, batch)
    _, loss, *placed = planned(
        stacked_loss, params, batch, STACKED_NAMES, MESHES[mesh], remat=remat, microbatches=microbatches
    )
    assert_same(value_and_gradients(loss, *placed), expected)


@pytest.mark.devices(8)
@pytest.mark.parametrize("mesh", list(MESHES))
def test_a_plain_function_without_layers(mesh: str) -> None:
    params, batch = flat_case()
    names = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
    expected = value_and_gradients(flat_loss, params, batch)
    _, loss, *placed = planned(flat_loss, params, batch, names, MESHES[mesh])
    assert_same(value_and_gradients(loss, *placed), expected)


@pytest.mark.devices(8)
def test_aux_values_and_gradients_lie_where_they_should() -> None:
    params, batch = stacked_params(), stacked_batch()
    plan, loss, *placed = planned(
        stacked_loss, params, batch, STACKED_NAMES, MESHES["data 2 x fsdp 2 x tensor 2"]
    )
    (_, aux), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(*placed)
    assert float(aux["weight"]) == batch["weight"].sum()
    stored = plan.shardings(params, plan.make_mesh())
    for gradient, sharding in zip(jax.tree.leaves(gradients), jax.tree.leaves(stored), strict=True):
        assert gradient.sharding.is_equivalent_to(sharding, gradient.ndim)


@pytest.mark.devices(8)
def test_compute_in_bfloat16_gathers_what_it_computes_with() -> None:
    """The cast comes before the gather: half the traffic."""

    def loss(params: Any, batch: Any) -> Any:
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        return jnp.square(batch["x"].astype(jnp.bfloat16) @ low["up"]).astype(jnp.float32).mean()

    arrays = {"up": np.ones((16, 32), np.float32)}, {"x": np.ones((ROWS, 16), np.float32)}
    plan, sharded, *placed = planned(loss, *arrays, {"up": ("embed", "mlp")}, {"fsdp": 8})
    program = str(jax.make_jaxpr(sharded)(*placed))
    constrained = [line for line in program.splitlines() if "sharding_constraint" in line]
    assert plan.params["up"].spec == ("fsdp",)
    assert constrained
    assert any("bf16[16,32]" in line for line in constrained)
    assert not any("f32[16,32]" in line.replace("bf16", "") for line in constrained)


@pytest.mark.devices(8)
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_weights_that_a_loop_casts_learn_in_their_own_type(mesh: dict[str, int]) -> None:
    """Read in bfloat16 by every chunk, their gradient is the sum of the chunks' in float32."""
    chunks, width, vocab = 64, 16, 32

    def loss(params: Any, batch: Any) -> Any:
        def add(total: Any, chunk: Any) -> tuple[Any, None]:
            scores = chunk.astype(jnp.bfloat16) @ params["out"].astype(jnp.bfloat16)
            return total + scores.astype(jnp.float32).mean(), None

        return jax.lax.scan(add, jnp.float32(0), batch["x"].swapaxes(0, 1))[0] / chunks

    params = {"out": np.random.default_rng(4).normal(size=(width, vocab)).astype(np.float32)}
    # A sum in bfloat16 would lose them: each chunk's share is a 512th of the first one's.
    x = np.full((ROWS, chunks, width), 1 / 512, np.float32)
    x[:, -1] = 1.0
    _, sharded, *placed = planned(loss, params, {"x": x}, {"out": ("embed", "vocab")}, mesh)
    value, gradients = value_and_gradients(sharded, *placed)
    expected, _ = value_and_gradients(loss, params, {"x": x})
    np.testing.assert_allclose(value, expected, rtol=2e-2)
    np.testing.assert_allclose(gradients["out"], (1 + (chunks - 1) / 512) / vocab / chunks, rtol=1e-6)


@pytest.mark.numerics(False)
@pytest.mark.devices(8)
def test_fsdp_gathers_parameters_and_never_activations() -> None:
    batch = text()
    plan, loss, params, placed = planned(
        model().loss, decoder_params(), batch, model().names, {"fsdp": 8}, remat="full"
    )
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    compiled = step.lower(params, placed).compile()
    hlo = compiled.as_text()
    program = parse_hlo(hlo)
    gathers = [
        instruction
        for instruction in program.instructions.values()
        if instruction.collective is not None and instruction.collective.kind == "all_gather"
    ]
    assert gathers
    whole_shapes = {row.shape for row in plan.params.values()}
    # A layer's slice of stacked parameters; XLA may keep the stacked dimension at size 1, or flatten it.
    sizes = {int(np.prod(shape)) for shape in whole_shapes}
    sizes |= {int(np.prod(shape[1:])) for shape in whole_shapes}
    axes = {"fsdp": 8}
    for instruction in gathers:
        assert instruction.collective is not None
        assert axes_of_groups(instruction.collective.groups, axes).names == ("fsdp",)
        for shape in result_shapes(hlo, instruction.name):
            assert int(np.prod(shape)) in sizes, (instruction.name, shape)
    moved = {i.collective.kind for i in program.instructions.values() if i.collective is not None}
    assert "all_to_all" not in moved


def result_shapes(hlo: str, name: str) -> list[tuple[int, ...]]:
    """Shapes in the result of the instruction called `name`."""
    line = next(
        line for line in hlo.splitlines() if line.strip().removeprefix("ROOT ").startswith(f"%{name} = ")
    )
    result = line.split(" = ", 1)[1].split(" all-gather", 1)[0]
    return [
        tuple(int(size) for size in found.split(",") if size)
        for found in re.findall(r"\w+\[([\d,]*)\]", result)
    ]


@pytest.mark.numerics(False)
@pytest.mark.devices(8)
def test_no_device_ever_holds_all_parameters() -> None:
    """Stacked layers are gathered one at a time: what a device needs stays far below the whole."""

    def loss(params: Any, batch: Any) -> Any:
        def layer(x: Any, weight: Any) -> tuple[Any, None]:
            return jnp.tanh(x @ weight), None

        return jnp.square(jax.lax.scan(layer, batch["x"], params["w"])[0]).mean()

    layers, width = 16, 128
    params = {"w": jax.ShapeDtypeStruct((layers, width, width), jnp.float32)}
    batch = {"x": jax.ShapeDtypeStruct((8, width), jnp.float32)}
    plan = declare(
        loss,
        params,
        batch,
        topology="cpu:8",
        mesh={"fsdp": 8},
        names={"w": ("layers", "embed", "mlp")},
        remat="full",
    )
    mesh = plan.make_mesh()
    given = [
        jax.tree.map(
            lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to),
            tree,
            plan.shardings(tree, mesh, kind),
        )
        for tree, kind in ((params, "params"), (batch, "batch"))
    ]
    memory = jax.jit(jax.grad(plan.apply(loss, mesh))).lower(*given).compile().memory_analysis()
    whole = layers * width * width * 4
    assert memory.argument_size_in_bytes < whole / 8 * 1.1
    assert memory.output_size_in_bytes < whole / 8 * 1.1
    assert memory.temp_size_in_bytes < whole * 0.6


@pytest.mark.numerics(False)
@pytest.mark.devices(8)
def test_layers_of_gathered_parameters_are_worked_again_as_planned() -> None:
    """That each product gathers its parameter again is no checkpoint of the layer."""

    def loss(params: Any, batch: Any) -> Any:
        def layer(x: Any, weight: Any) -> tuple[Any, None]:
            return jnp.sin(jnp.tanh(jnp.cos(x)) @ weight), None

        return jnp.square(jax.lax.scan(layer, batch["x"], params["w"])[0]).mean()

    params = {"w": np.zeros((16, 32, 32), np.float32)}
    batch = {"x": np.zeros((8192, 32), np.float32)}
    held = {}
    for remat in ("none", "full"):
        _, sharded, *placed = planned(
            loss, params, batch, {"w": ("layers", "embed", "mlp")}, {"fsdp": 8}, remat=remat
        )
        memory = jax.jit(jax.grad(sharded)).lower(*placed).compile().memory_analysis()
        held[remat] = memory.temp_size_in_bytes
    assert held["full"] < 0.6 * held["none"]


@pytest.mark.processes(2, devices=4, timeout_seconds=120)
def test_two_processes() -> None:
    compare_on_all_processes(stacked_loss, stacked_params(), stacked_batch(), STACKED_NAMES)


@pytest.mark.slow
@pytest.mark.processes(2, devices=4, timeout_seconds=180)
def test_a_decoder_on_two_processes() -> None:
    compare_on_all_processes(model().loss, decoder_params(), text(), model().names)


def compare_on_all_processes(function: Any, params: Any, batch: Any, names: Any) -> None:
    assert jax.process_count() == 2
    assert len(jax.local_devices()) == 4
    expected = value_and_gradients(function, params, batch)
    plan, loss, *placed = planned(
        function, params, batch, names, MESHES["data 2 x fsdp 2 x tensor 2"], microbatches=2
    )
    whole = NamedSharding(plan.make_mesh(), PartitionSpec())
    (value, _), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=whole)(*placed)
    local = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), gradients)
    assert_same((float(value.addressable_data(0)), local), expected)
