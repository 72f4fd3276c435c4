"""Attention over a sequence that lies over `context`, in each way, against plain attention on one device."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import Plan, UserError, declare, plan
from meshwright.sharding.ops import attention, cudnn

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

ROWS, EMBED, HEADS, WIDTH = 4, 16, 8, 8
SHAPES = {"query": HEADS, "key": 4, "value": 4}
NAMES = {name: ("layers", "embed", f"heads of {name}", f"width of {name}") for name in SHAPES}
NAMES["query"] = ("layers", "embed", "heads", "head_dim")
NAMES["output"] = ("layers", "heads", "value_dim", "embed")


def loss_of(asked: tuple[tuple[str, Any], ...]) -> Any:
    options = dict(asked)
    options.pop("value_width", None)
    packed = options.pop("packed", True)

    def loss(params: Any, batch: Any) -> Any:
        def layer(x: Any, own: Any) -> Any:
            arrays = (jnp.einsum("bse,ehd->bshd", x, own[name]) for name in SHAPES)
            out = attention(*arrays, segment_ids=batch["segments"] if packed else None, **options)
            return x + jnp.einsum("bshd,hde->bse", out, own["output"]), None

        x, _ = jax.lax.scan(layer, batch["x"], params)
        return jnp.mean(jnp.square(x))

    return loss


@functools.cache
def problem(sequence: int, asked: tuple[tuple[str, Any], ...]) -> tuple[Any, Any, Any]:
    """Return parameters, a batch, and the plain loss with its gradients."""
    value_width = dict(asked).get("value_width", WIDTH)
    shapes = {name: (2, EMBED, heads, WIDTH) for name, heads in SHAPES.items()}
    shapes["value"] = (*shapes["value"][:3], value_width)
    shapes["output"] = (2, HEADS, value_width, EMBED)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        name: 0.1 * draws.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(ROWS, sequence, EMBED)).astype(np.float32),
        "segments": np.sort(rng.integers(0, 3, (ROWS, sequence)), axis=1).astype(np.int32),
    }
    return params, batch, jax.jit(jax.value_and_grad(loss_of(asked)))(params, batch)


def made(mesh: dict[str, int], way: str | None, sequence: int = 32, **asked: Any) -> Plan:
    params, batch, _ = problem(sequence, tuple(asked.items()))
    loss = loss_of(tuple(asked.items()))
    return declare(loss, params, batch, topology="cpu:8", mesh=mesh, names=NAMES, context=way)


def check(mesh: dict[str, int], way: str, changes: dict[str, Any], **asked: Any) -> collections.Counter[str]:
    """Compare a way with the plain loss, and return how often each collective stands in the program."""
    params, batch, (value, gradients) = problem(32, tuple(asked.items()))
    loss = loss_of(tuple(asked.items()))
    plan = declare(loss, params, batch, topology="cpu:8", mesh=mesh, names=NAMES, context=way, **changes)
    on = plan.make_mesh()
    placed = jax.device_put((params, batch), (plan.shardings(params, on), plan.shardings(batch, on, "batch")))
    compiled = jax.jit(jax.value_and_grad(plan.apply(loss))).lower(*placed).compile()
    found, learnt = compiled(*placed)
    assert abs(found - value) <= 1e-6 * abs(value)
    for name, one in gradients.items():
        error = np.linalg.norm(np.asarray(learnt[name]) - one) / np.linalg.norm(one)
        assert error <= 1e-5, (name, error)
    return collections.Counter(re.findall(r" ([a-z-]+)(?:-start)?\(", compiled.as_text()))


def equations_of(jaxpr: Any) -> Any:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations_of(inner)


def test_a_ring_sends_keys_and_gathers_nothing() -> None:
    found = check({"context": 4, "data": 2}, "ring", {})
    assert found["collective-permute"] > 0
    assert found["all-gather"] == 0


def test_heads_trade_the_sequence() -> None:
    found = check({"context": 4, "data": 2}, "heads", {"remat": "full"}, cap=4.0, packed=False)
    assert found["all-to-all"] > 0
    assert found["collective-permute"] == 0


def test_a_window_fetches_its_neighbours() -> None:
    found = check({"context": 4, "data": 2}, "neighbours", {}, window=7)
    assert found["collective-permute"] > 0
    assert found["all-gather"] == 0


def test_gathered_keys_lie_beside_other_axes() -> None:
    check({"context": 2, "fsdp": 2, "tensor": 2}, "gathered", {}, value_width=4)


@pytest.mark.once("sharding/transform/test_context.py")
def test_no_mask_of_all_pairs_is_taken_out_of_a_loop_over_layers() -> None:
    params, batch, _ = problem(64, ())
    applied = made({"context": 8}, "ring", sequence=64).apply(loss_of(()))
    said = str(jax.make_jaxpr(jax.grad(applied))(params, batch))
    # Of six turns with pairs of blocks of four rows: which scores count is made where they are.
    assert "bool[4,1,1,4,4]" in said
    assert not re.findall(r"bool\[[^]]*,4,4,2,4,4\]", said)


@pytest.mark.once("sharding/transform/test_context.py")
def test_no_array_of_a_pair_s_scores_is_read_in_every_turn_where_layers_are_run_again() -> None:
    params, batch, _ = problem(64, ())
    asked = {"topology": "cpu:8", "mesh": {"context": 8}, "names": NAMES, "context": "ring", "remat": "full"}
    applied = declare(loss_of(()), params, batch, **asked).apply(loss_of(()))
    scans = [
        eqn
        for eqn in equations_of(jax.make_jaxpr(jax.grad(applied))(params, batch).jaxpr)
        if eqn.primitive.name == "scan"
    ]
    # What is put for hidden scores is one number: an array of it is as many bytes as the scores.
    pair = (ROWS, 4, 2, 4, 4)
    shapes = [atom.aval.shape for eqn in scans for atom in eqn.invars]
    assert any(shape[-3:] == (2, 4, WIDTH) for shape in shapes)
    assert not [shape for shape in shapes if shape[-5:] == pair]


def test_the_sequence_of_a_single_row_lies_over_context() -> None:
    params, batch, _ = problem(32, ())
    batch = jax.tree.map(lambda x: x[:1], batch)
    loss = loss_of(())
    plan = declare(loss, params, batch, topology="cpu:8", mesh={"context": 8}, context="gathered")
    assert tuple(plan.batch["x"].spec)[:2] == (None, "context")
    value, gradients = jax.jit(jax.value_and_grad(loss))(params, batch)
    on = plan.make_mesh()
    placed = jax.device_put((params, batch), (plan.shardings(params, on), plan.shardings(batch, on, "batch")))
    found, learnt = jax.jit(jax.value_and_grad(plan.apply(loss)))(*placed)
    assert abs(found - value) <= 1e-6 * abs(value)
    for name, one in gradients.items():
        assert np.linalg.norm(learnt[name] - one) <= 1e-5 * np.linalg.norm(one)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["gathered", "heads", "ring"])
@pytest.mark.parametrize(
    ("mesh", "changes", "asked"),
    [
        ({"context": 2, "data": 2, "tensor": 2}, {"microbatches": 2}, {"cap": 4.0}),
        ({"stage": 2, "context": 4}, {"microbatches": 2, "remat": "full"}, {"causal": False}),
        ({"context": 2, "fsdp": 4}, {}, {"packed": False, "value_width": 4}),
    ],
    ids=["tensor, in parts, capped", "over stages, run again, not causal", "narrow values"],
)
def test_every_way_keeps_its_values(
    way: str, mesh: dict[str, int], changes: dict[str, Any], asked: dict[str, Any]
) -> None:
    check(mesh, way, changes, **asked)


def test_a_window_across_two_layers_of_chunks() -> None:
    """A window that reaches beyond the chunk before takes two, and a ring of a window is refused."""
    assert made({"context": 8}, "neighbours", window=6).context == "neighbours"
    with pytest.raises(UserError, match=r"a ring works with all keys.*context='neighbours' can"):
        made({"context": 8}, "ring", window=6)
    with pytest.raises(UserError, match=r"window=6 reaches few of 8 chunks.*context='neighbours' can"):
        made({"context": 8}, "gathered", window=6)


@pytest.mark.parametrize(
    ("mesh", "way", "sequence", "said"),
    [
        ({"context": 4, "data": 2}, "neighbours", 32, "no window that is known beforehand"),
        ({"context": 8}, "rng", 32, "did you mean 'ring'"),
        (
            {"context": 4, "data": 2},
            "ring",
            18,
            "segments \\(4, 18\\): context=4 does not divide sequence=18; nearest: 2, or sequence=16 or 20",
        ),
        ({"data": 4, "tensor": 2}, "ring", 32, "a mesh axis that the mesh does not have"),
        (
            {"context": 4, "data": 2},
            "ring",
            36,
            "does not divide 36 queries into chunks of two halves; nearest: 2;",
        ),
        ({"context": 4, "data": 1, "tensor": 2}, "heads", 32, None),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(
    mesh: dict[str, int], way: str, sequence: int, said: str | None
) -> None:
    if said is None:
        assert made(mesh, way, sequence).context == way
        return
    with pytest.raises(UserError, match=said):
        made(mesh, way, sequence)


def test_a_plan_chooses_a_way_and_keeps_it_in_its_file(tmp_path: Any) -> None:
    plan = made({"context": 4, "data": 2}, None)
    assert plan.context in ("gathered", "heads", "ring")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").context == plan.context
    assert made({"data": 4, "tensor": 2}, None).context is None


BLOCKS = {"attention": {"implementation": "splash", "block_q": 128, "block_kv": 128}}


def by_splash(mesh: dict[str, int], way: str, sequence: int, **asked: Any) -> tuple[Any, Any, Any]:
    """Return loss and gradients by a plan with splash, what they are of, and the plain ones."""
    params, batch, plain = problem(sequence, tuple(asked.items()))
    plan = dataclasses.replace(made(mesh, way, sequence, **asked), kernels=BLOCKS)
    on = plan.make_mesh()
    placed = jax.device_put((params, batch), (plan.shardings(params, on), plan.shardings(batch, on, "batch")))
    return jax.value_and_grad(plan.apply(loss_of(tuple(asked.items())))), placed, plain


def test_the_chips_kernel_works_a_ring_through() -> None:
    """Both passes are splash's, and what goes round is not gathered."""
    found, placed, _ = by_splash({"context": 2, "data": 2, "tensor": 2}, "ring", 512)
    text = str(jax.make_jaxpr(found)(*placed))
    assert "splash_mha_fwd" in text
    assert "splash_mha_dkv" in text
    assert "ppermute" in text
    assert "all_gather" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "way", "sequence", "asked"),
    [
        ({"context": 2, "data": 2, "tensor": 2}, "ring", 512, {}),
        ({"context": 4, "tensor": 2}, "ring", 1024, {"packed": False}),
        ({"context": 2, "data": 2, "tensor": 2}, "ring", 256, {"causal": False}),
        ({"context": 2, "data": 2, "tensor": 2}, "heads", 256, {"cap": 4.0}),
        ({"context": 2, "data": 2, "tensor": 2}, "gathered", 512, {}),
        ({"context": 4, "tensor": 2}, "neighbours", 512, {"window": 60}),
        ({"context": 4, "tensor": 2}, "neighbours", 512, {"window": 200, "packed": False}),
        ({"stage": 2, "context": 4}, "neighbours", 512, {"window": 60}),
    ],
)
def test_the_chips_kernel_keeps_values(
    mesh: dict[str, int], way: str, sequence: int, asked: dict[str, Any]
) -> None:
    run, placed, (value, gradients) = by_splash(mesh, way, sequence, **asked)
    found, learnt = jax.jit(run)(*placed)
    assert abs(found - value) <= 1e-6 * abs(value)
    for name, one in gradients.items():
        assert np.linalg.norm(np.asarray(learnt[name]) - one) <= 1e-5 * np.linalg.norm(one), name


def test_a_stage_sends_for_its_layers_alone_and_for_those_it_runs_again() -> None:
    """Half of the layers, forward twice, of twice the rows: half as much again."""
    params, _, _ = problem(32, ())
    params = {
        name: jax.ShapeDtypeStruct((4, 512, *array.shape[2:3], 128), "bfloat16")
        for name, array in params.items()
    }
    params["output"] = jax.ShapeDtypeStruct((4, HEADS, 128, 512), "bfloat16")
    batch = {"x": jax.ShapeDtypeStruct((32, 8192, 512), "bfloat16")}
    batch["segments"] = jax.ShapeDtypeStruct((32, 8192), "int32")
    declared: Any = {"names": NAMES, "context": "heads", "microbatches": 4, "topology": "v5p:2x2x2"}
    data, stages = (
        declare(loss_of(()), params, batch, mesh={axis: 2, "context": 4}, **declared).estimate
        for axis in ("data", "stage")
    )
    assert data is not None
    assert stages is not None
    sent = "all_to_all/context"
    assert stages.time[sent] == pytest.approx(1.5 * data.time[sent], rel=0.01)


@pytest.mark.parametrize(
    ("rows", "sequence", "cuts"), [(4, 65536, True), (64, 65536, False), (4, 8192, False)]
)
def test_a_search_cuts_long_sequences_of_few_rows(rows: int, sequence: int, cuts: bool) -> None:
    """A sequence is cut where it is long and rows do not fill the devices, and the reason has numbers."""
    params, _, _ = problem(32, ())
    params = {
        name: jax.ShapeDtypeStruct((2, 512, *array.shape[2:3], 128), "bfloat16")
        for name, array in params.items()
    }
    params["output"] = jax.ShapeDtypeStruct((2, HEADS, 128, 512), "bfloat16")
    shape = (rows, sequence)
    batch = {
        "x": jax.ShapeDtypeStruct((*shape, 512), "bfloat16"),
        "segments": jax.ShapeDtypeStruct(shape, "int32"),
    }
    found = plan(loss_of(()), params, batch, topology="v5p:2x2x4", names=NAMES)
    assert (found.mesh.get("context", 1) > 1) == cuts
    if cuts:
        assert found.context is not None
        assert found.kernels["attention"]["implementation"] == "splash"
        assert " s" in found.explain("context=1") or "ms" in found.explain("context=1")


def test_heads_by_cudnn_run_no_forward_pass_again_for_a_result_that_is_kept() -> None:
    """The kernel's result and sums are kept as it gave them; only its trade for heads is made once more."""
    heads = {"query": 8, "key": 4, "value": 4}
    params = {name: jax.ShapeDtypeStruct((2, 128, count, 64), jnp.bfloat16) for name, count in heads.items()}
    params["output"] = jax.ShapeDtypeStruct((2, 8, 64, 128), jnp.bfloat16)
    batch = {"x": jax.ShapeDtypeStruct((4, 1024, 128), jnp.bfloat16)}
    batch["segments"] = jax.ShapeDtypeStruct((4, 1024), jnp.int32)
    loss, mesh = loss_of(()), {"context": 4, "data": 2}
    asked: dict[str, Any] = {"topology": "h100:1x8", "mesh": mesh, "names": NAMES, "context": "heads"}
    automatic = (jax.sharding.AxisType.Auto,) * 2
    on = jax.make_mesh(tuple(mesh.values()), tuple(mesh), axis_types=automatic)
    runs = {}
    for remat in ("full", {"output:in": "device"}):
        made = declare(loss, params, batch, attention="cudnn", remat=remat, **asked)
        with cudnn.described():
            text = str(jax.make_jaxpr(jax.grad(made.apply(loss, on)))(params, batch))
        runs[str(remat)] = len(re.findall(r"dot_product_attention_fwd\w*\[", text))
    assert runs["full"] == 2 * runs["{'output:in': 'device'}"] > 0


def shifted(params: Any, batch: Any) -> Any:
    """Next tokens of rows that are one longer than what attention sees, with learnt positions."""
    tokens = batch["tokens"]
    x = params["table"][tokens[:, :-1]] + params["positions"]
    return of_tokens(params, x) + 0.1 * jnp.square(params["table"][tokens[:, 1:]] - x).mean()


def with_a_class_token(params: Any, batch: Any) -> Any:
    """Patches behind one learnt token, so that attention sees one more than the data have."""
    x = params["table"][batch["tokens"]]
    first = jnp.broadcast_to(params["positions"][:1], (x.shape[0], 1, EMBED))
    return of_tokens(params, jnp.concatenate([first, x], axis=1))


def of_tokens(params: Any, x: Any) -> Any:
    arrays = (jnp.einsum("bse,ehd->bshd", x, params[name]) for name in SHAPES)
    out = x + jnp.einsum("bshd,hde->bse", attention(*arrays), params["output"])
    return jnp.square(out[:, 0]).mean() + jnp.square(jnp.tanh(out)).mean()


@pytest.mark.once("sharding/transform/test_context.py")
@pytest.mark.parametrize(
    ("loss", "tokens", "sends"), [(shifted, 33, "collective-permute"), (with_a_class_token, 31, None)]
)
@pytest.mark.parametrize("how", ["declare", "plan"])
def test_a_sequence_that_the_loss_makes_of_the_datas_lies_over_context(
    loss: Any, tokens: int, sends: str | None, how: str
) -> None:
    """The data's own lies whole where the axis does not divide it; what attention sees of it does not."""
    shapes = {"table": (8, EMBED), "positions": (32, EMBED), "output": (HEADS, WIDTH, EMBED)}
    shapes |= {name: (EMBED, heads, WIDTH) for name, heads in SHAPES.items()}
    params = {name: 0.3 * draws.normal(jax.random.key(n), shapes[name]) for n, name in enumerate(shapes)}
    batch = {"tokens": np.random.default_rng(0).integers(0, 8, (ROWS, tokens)).astype(np.int32)}
    value, gradients = jax.jit(jax.value_and_grad(loss))(params, batch)
    make = {"declare": declare, "plan": plan}[how]
    made = make(loss, params, batch, topology="cpu:8", mesh={"context": 4, "data": 2}, context="ring")
    assert made.context == "ring"
    assert made.batch["tokens"].spec[1:] in ((), (None,))
    said = rf"tokens \(4, {tokens}\) lies whole over context=4, which does not divide {tokens}; the 32"
    assert re.search(said, " ".join(made.notes))
    on = made.make_mesh()
    placed = jax.device_put((params, batch), (made.shardings(params, on), made.shardings(batch, on, "batch")))
    compiled = jax.jit(jax.value_and_grad(made.apply(loss))).lower(*placed).compile()
    found, learnt = compiled(*placed)
    assert abs(found - value) <= 1e-6 * abs(value)
    for name, one in gradients.items():
        error = np.linalg.norm(np.asarray(learnt[name]) - one) / np.linalg.norm(one)
        assert error <= 1e-5, (name, error)
    assert sends is None or sends in compiled.as_text()
