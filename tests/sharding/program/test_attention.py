"""Attention as people write it is recognised, keeps its values, and is what a plan's kernel carries out."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from meshwright.sharding import declare
from meshwright.sharding.ops.attention import attention_call

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import attention_ways as ways
import segment_ways
import softmax_ways
from meshwright.sharding.program.recognise import recognised
from recognition import calls, traced

pytestmark = pytest.mark.numerics

WAYS, LEFT = ways.WAYS | segment_ways.WAYS | softmax_ways.WAYS, ways.LEFT | softmax_ways.LEFT
LOOSE = {"half precision": 1e-2, "widened to float32": 1e-2}


def floats(given):
    return {name: one for name, one in given.items() if one.dtype == jnp.float32}


def loss_of(chosen):
    def loss(floats, given):
        out = {name: way({**given, **floats}) for name, way in chosen.items()}
        return sum(jnp.sum(jnp.sin(one)) for one in out.values()), out

    return loss


def both(loss, found, given):
    def again(floats, given):
        leaves = core.jaxpr_as_fun(found.jaxpr)(*jax.tree.leaves((floats, given)))
        return jax.tree.unflatten(jax.tree.structure(found.result), leaves)

    run = [jax.jit(jax.value_and_grad(one, has_aux=True)) for one in (loss, again)]
    return [one(floats(given), given) for one in run]


def attentions(jaxpr):
    for eqn in jaxpr.eqns:
        if (call := attention_call(eqn)) is not None:
            yield call
        for inner in core.jaxprs_in_params(eqn.params):
            yield from attentions(inner)


def unseeing():
    """Sequences of which some queries see no key: padded in front, in between, or wholly.

    Segments come back after others.
    """
    given = ways.arrays(seed=1)
    keep = np.array(given["keep"])
    keep[0, :3], keep[0, 6:11], keep[1] = False, False, False
    given["segment"] = given["segment"].at[0].set(jnp.roll(given["segment"][0], 5))
    return {**given, "keep": jnp.asarray(keep), "segment": given["segment"] * keep}


SAMPLE = [
    "window by two triangles",
    "segments in a window",
    "heads in the batch",
    "softmax by hand",
    "mapped over heads",
    "widened to float32",
    "in a checkpointed loop",
    "jax.nn, lengths",
    "NNX's function, padded",
    "causal among the first keys",
    "scaled after its bias",
    "sinks of heads",
    "a sink beside the sum",
    "a sink of plain exps",
    "by a learned number",
    "batch and heads taken apart",
    "absorbed latents",
    "NNX's dropout",
    "Linen's module",
    "two products",
    "softmax(where=)",
    "exps hidden",
    "exp of log_softmax",
    "exp less logsumexp",
]
PADDED = [name for name in WAYS if "padd" in name or "pairs" in name] + ["two masks, added"]
# By itself: a gradient of bfloat16 is off by one rounding of its own size, those of float32 by a millionth.
HALVES = [([name], ways.arrays) for name in LOOSE]
ALL = pytest.param([name for name in WAYS if name not in LOOSE], ways.arrays, marks=pytest.mark.slow)


@pytest.mark.parametrize(("names", "make"), [(SAMPLE, ways.arrays), (PADDED, unseeing), *HALVES, ALL])
def test_every_way_becomes_one_call_and_keeps_values_and_gradients(names, make) -> None:
    given = make()
    chosen = {name: WAYS[name] for name in names}
    loss = loss_of(chosen)
    found = recognised(traced(loss, floats(given), given), ("attention",))
    assert calls(found.jaxpr.jaxpr) == len(chosen)
    assert found.notes == ()
    ((_, plain), gradient), ((_, mine), other) = both(loss, found, given)
    for name, out in plain.items():
        np.testing.assert_allclose(mine[name], out, rtol=1e-4, atol=LOOSE.get(name, 1e-5), err_msg=name)
    for name, one in gradient.items():
        alone, halves = len(names) == 1, not LOOSE.keys().isdisjoint(names)
        rounding = 2**-7 * float(abs(one).max()) if alone else 2e-2 if halves else 2e-3
        np.testing.assert_allclose(other[name], one, atol=rounding, err_msg=name)


@pytest.mark.parametrize("name", ["places of a cache", "places of pieces"])
def test_what_is_counted_or_cut_from_constants_is_places_and_needs_no_array_of_pairs(name) -> None:
    given = ways.arrays()
    found = []
    for way in (name, "places compared"):
        program = recognised(traced(loss_of({way: WAYS[way]}), floats(given), given), ("attention",))
        found += attentions(program.jaxpr.jaxpr)
    assert len(found) == 2
    assert found[0].segments == 0
    assert found[0] == found[1]


@pytest.mark.parametrize("name", segment_ways.WAYS)
def test_segments_beside_padding_or_of_other_keys_need_no_array_of_pairs(name) -> None:
    given = ways.arrays()
    program = recognised(traced(loss_of({name: WAYS[name]}), floats(given), given), ("attention",))
    (call,) = attentions(program.jaxpr.jaxpr)
    assert call.segments
    assert "mask" not in call.given


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_is_told_with_its_line_and_its_scores(name) -> None:
    way, why = LEFT[name]
    given = ways.arrays()
    one = traced(loss_of({name: way}), floats(given), given)
    found = recognised(one, ("attention",))
    assert found.jaxpr is one.jaxpr
    (note,) = found.notes
    assert why in note
    assert "_ways.py:" in note
    assert "its scores take 8.0 KiB" in note


def test_attention_in_float64_stays_in_it() -> None:
    def loss(p, x):
        scores = jnp.einsum("bqd,bkd->bqk", x @ p["query"], x @ p["key"])
        return jnp.mean(jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), x) ** 2)

    with jax.enable_x64(True):
        shape = jax.ShapeDtypeStruct
        given = (
            {"query": shape((8, 8), "float64"), "key": shape((8, 8), "float64")},
            shape((2, 16, 8), "float64"),
        )
        one = traced(loss, *given)
        found = recognised(one, ("attention",))
    assert found.jaxpr is one.jaxpr
    assert "it is in float64" in found.notes[0]


@pytest.mark.parametrize("name", ways.OTHER)
def test_what_is_no_attention_of_the_forms_is_left(name) -> None:
    given = ways.arrays()
    one = traced(loss_of({name: ways.OTHER[name]}), floats(given), given)
    assert recognised(one, ("attention",)).jaxpr is one.jaxpr


def packed(params, batch):
    """Two layers in a checkpointed scan, whose mask is made once outside of it."""
    place = jnp.arange(batch["segment"].shape[1])
    same = batch["segment"][:, :, None] == batch["segment"][:, None, :]
    mask = (same & (place[:, None] >= place))[:, None]

    def layer(x, weights):
        query, key, value = (jnp.einsum("bsd,dnh->bsnh", x, weights[name]) for name in "qkv")
        out = jax.nn.dot_product_attention(query, key, value, mask=mask)
        return x + jnp.einsum("bsnh,nhd->bsd", out, weights["o"]), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), batch["x"], params)
    return jnp.mean(x**2)


@pytest.mark.once("sharding/transform/test_attention.py")
@pytest.mark.numerics(False)
@pytest.mark.devices(8)
def test_planned_attention_on_several_devices_is_the_plain_one_and_holds_no_scores() -> None:
    draw = np.random.default_rng(0)
    rows, length, width, heads, depth = 8, 256, 16, 4, 2
    sizes = {"q": (width, heads, 8), "k": (width, 2, 8), "v": (width, 2, 8), "o": (heads, 8, width)}
    params = {k: jnp.asarray(draw.normal(size=(depth, *s)), jnp.float32) / 4 for k, s in sizes.items()}
    batch = {
        "x": jnp.asarray(draw.normal(size=(rows, length, width)), jnp.float32),
        "segment": jnp.asarray(np.sort(draw.integers(0, 4, (rows, length))), jnp.int32),
    }
    expected = jax.jit(jax.value_and_grad(packed))(params, batch)
    temporary = {}
    for which in (("attention",), ()):
        mesh, rules = {"fsdp": 4, "tensor": 2}, {"*q": [None, None, "tensor"], "*o": [None, "tensor"]}
        made = declare(packed, params, batch, topology="cpu:8", mesh=mesh, rules=rules, recognise=which)
        devices = made.make_mesh()
        laid = (
            jax.device_put(params, made.shardings(params, devices)),
            jax.device_put(batch, made.shardings(batch, devices, "batch")),
        )
        compiled = jax.jit(jax.value_and_grad(made.apply(packed, devices))).lower(*laid).compile()
        temporary[which] = compiled.memory_analysis().temp_size_in_bytes
        value, gradients = compiled(*laid)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        for name, one in gradients.items():
            np.testing.assert_allclose(one, expected[1][name], atol=1e-5, err_msg=name)
    # Scores of a device's two rows and two heads take 1 MiB in float32, forward and backward.
    assert temporary["attention",] < temporary[()] - (1 << 20)


@pytest.mark.devices(8)
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "local_window_size": (70, 0)}, {"mask": True}])
def test_attention_that_asks_for_cudnn_is_planned_and_run_where_there_is_none(options) -> None:
    def loss(params, batch, implementation="cudnn"):
        ids = batch["segment"]
        mask = (ids[:, :, None] == ids[:, None, :])[:, None] if "mask" in options else None
        query, key = (batch["x"] * params[name] for name in "qk")
        query, key = query.astype(jnp.bfloat16), key[:, :, :2].astype(jnp.bfloat16)
        given = {**options, "mask": mask, "implementation": implementation}
        return jnp.mean(jax.nn.dot_product_attention(query, key, key, **given).astype(jnp.float32) ** 2)

    draw = np.random.default_rng(0)
    params = {name: jnp.ones(64) for name in "qk"}
    batch = {
        "x": jnp.asarray(draw.normal(size=(8, 128, 4, 64)), jnp.float32),
        "segment": jnp.asarray(np.sort(draw.integers(0, 3, (8, 128))), jnp.int32),
    }
    made = declare(loss, params, batch, topology="cpu:8", mesh={"data": 8})
    value, gradients = jax.jit(jax.value_and_grad(made.apply(loss)))(params, batch)
    plain = functools.partial(loss, implementation="xla")
    expected = jax.jit(jax.value_and_grad(plain))(params, batch)
    np.testing.assert_allclose(value, expected[0], rtol=1e-2)
    for name, one in gradients.items():
        a, b = (np.asarray(each, np.float32) for each in (one, expected[1][name]))
        np.testing.assert_allclose(a, b, atol=0.03 * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize(("length", "chunk"), [(201, None), (256, None), (512, 256), (4096, 1024)])
def test_short_sequences_are_scored_at_once_and_long_ones_in_chunks(length, chunk) -> None:
    """Vision models have two hundred tokens of 64 numbers a head: their scores are as small as these."""
    given = dict.fromkeys(("query", "key", "value"), jax.ShapeDtypeStruct((1, length, 4, 64), jnp.bfloat16))
    found = recognised(traced(lambda x: jnp.sum(ways.library()(x)), given), ("attention",))
    (call,) = (call for eqn in found.jaxpr.jaxpr.eqns if (call := attention_call(eqn)))
    assert call.chunk == chunk


def weights_over_their_norm(scores):
    weights = jnp.exp(scores)
    return weights / jnp.linalg.norm(weights, axis=-1, keepdims=True)


def weights_of_mixed_heads(scores):
    return jnp.einsum("bhqk,hg->bgqk", jax.nn.softmax(scores), jnp.eye(scores.shape[1]))


@pytest.mark.parametrize("weights", [weights_over_their_norm, weights_of_mixed_heads])
def test_attention_that_no_form_reads_is_a_note_with_its_line(weights):
    def loss(params, batch):
        scores = jnp.einsum("bqhd,bkhd->bhqk", params["query"], batch)
        return jnp.sin(jnp.einsum("bhqk,bkhd->bqhd", weights(scores), batch)).sum()

    line = loss.__code__.co_firstlineno + 2
    found = recognised(
        traced(loss, {"query": jnp.ones((2, 8, 3, 4))}, jnp.ones((2, 8, 3, 4))), ("attention",)
    )
    (note,) = found.notes
    assert f"test_attention.py:{line} (loss)): its weights are not read as a softmax over keys" in note


@pytest.mark.parametrize("between", [jax.nn.relu, jax.nn.sigmoid])
def test_products_of_experts_are_no_attention(between):
    def loss(params, batch):
        tokens = jnp.einsum("ted,dw->etw", batch, params["mix"])
        up = between(jnp.einsum("etw,ewf->etf", tokens, params["up"]))
        return jnp.einsum("etf,efw->etw", up, params["down"]).sum()

    params = {"mix": jnp.ones((4, 4)), "up": jnp.ones((3, 4, 8)), "down": jnp.ones((3, 8, 4))}
    assert not recognised(traced(loss, params, jnp.ones((5, 3, 4))), ("attention",)).notes


def test_attention_worked_through_in_blocks_by_hand_is_a_note():
    def loss(params, blocks):
        def body(carry, block):
            most, total, out = carry
            scores = jnp.einsum("bqd,bkd->bqk", params, block)
            new = jnp.maximum(most, scores.max(-1))
            weights, less = jnp.exp(scores - new[..., None]), jnp.exp(most - new)
            out = out * less[..., None] + jnp.einsum("bqk,bkd->bqd", weights, block)
            return (new, total * less + weights.sum(-1), out), None

        first = jnp.full((2, 8), -1e30), jnp.zeros((2, 8)), jnp.zeros((2, 8, 4))
        (_, total, out), _ = jax.lax.scan(body, first, blocks)
        return jnp.sin(out / total[..., None]).sum()

    found = recognised(traced(loss, jnp.ones((2, 8, 4)), jnp.ones((3, 2, 8, 4))), ("attention",))
    (note,) = found.notes
    assert "(body)): its weights are not read as a softmax over keys" in note


def test_what_is_no_attention_is_no_note():
    def loss(params, x):
        routed = jax.nn.softmax(x @ params) * jnp.exp(-jnp.square(x @ params))
        return -jax.nn.log_softmax(jnp.einsum("ned,ndf->nef", routed[:, None], routed[:, :, None])).mean()

    assert recognised(traced(loss, jnp.ones((8, 4)), jnp.ones((16, 8))), ("attention",)).notes == ()
