"""Which kernel a plan has for attention, on which chip, and why not where it has none."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from meshwright.sharding import Plan, UserError, declare, plan
from meshwright.sharding.ops import attention
from meshwright.sharding.planner.choices.attention import vmem_bytes

SPLASH = {"attention": {"implementation": "splash", "block_q": 1024, "block_kv": 1024}}


def program(
    sequence: int = 4096,
    heads: int = 8,
    head_dim: int = 128,
    dtype: Any = jnp.bfloat16,
    *,
    packed: bool = True,
    **options: Any,
) -> tuple[Any, Any, Any]:
    def loss(params: Any, batch: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            query, key, value = (
                jnp.einsum("bse,ehd->bshd", x, w[name]) for name in ("query", "key", "value")
            )
            traced = {"window": batch["window"]} if "window" in batch else {}
            ids = batch["segments"] if packed else None
            out = attention(query, key, value, segment_ids=ids, **traced, **options)
            return x + jnp.einsum("bshd,hde->bse", out, w["output"]), None

        x, _ = jax.lax.scan(layer, batch["x"], params)
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    shape, embed, layers = jax.ShapeDtypeStruct, 1024, 4
    projection = shape((layers, embed, heads, head_dim), dtype)
    params = dict.fromkeys(("query", "key", "value"), projection)
    params["output"] = shape((layers, heads, head_dim, embed), dtype)
    batch = {"x": shape((32, sequence, embed), dtype), "segments": shape((32, sequence), "int32")}
    return loss, params, batch


def test_each_chip_has_its_own() -> None:
    for topology in ("v4:2x2x2", "v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"):
        assert plan(*program(), topology=topology).kernels["attention"]["implementation"] == "splash"
    assert plan(*program(), topology="h100:1x8").kernels == {"attention": {"implementation": "cudnn"}}
    assert plan(*program(), topology="cpu:8").kernels == {}
    assert declare(*program(), topology="v5p:2x2x2", mesh={"fsdp": -1}).kernels == SPLASH


def test_it_stands_in_the_plan_and_makes_it_faster(tmp_path: pathlib.Path) -> None:
    fused = plan(*program(), topology="v5p:2x2x2", remat="full", microbatches=1)
    plain = plan(*program(), topology="v5p:2x2x2", remat="full", microbatches=1, attention="xla")
    assert fused.kernels == SPLASH
    assert "kernels" not in plain.to_dict()
    # What slows the step is said of any; nothing is said of a kernel that was not asked for.
    others = [note for note in plain.notes if not note.startswith(("MFU", "in the way"))]
    assert "attention" not in " ".join(others)
    fused.save(tmp_path / "fused.json")
    assert Plan.load(tmp_path / "fused.json").kernels == SPLASH
    assert fused.estimate is not None
    assert plain.estimate is not None
    # Plain attention reads and writes scores of sequence x sequence several times, and computes all of them.
    assert fused.estimate.time["compute/elementwise"] < plain.estimate.time["compute/elementwise"] / 4
    assert fused.estimate.time["compute/attention"] < plain.estimate.time["compute/attention"]
    assert fused.estimate.time["compute/matmul"] == pytest.approx(plain.estimate.time["compute/matmul"])
    assert fused.estimate.memory["temporaries"] < plain.estimate.memory["temporaries"]


def test_a_narrow_window_leaves_few_scores() -> None:
    whole, narrow = (
        plan(*program(**options), topology="v5p:2x2x2", remat="full", microbatches=1)
        for options in ({}, {"window": 256})
    )
    assert whole.estimate is not None
    assert narrow.estimate is not None
    ratio = narrow.estimate.time["compute/attention"] / whole.estimate.time["compute/attention"]
    assert ratio == pytest.approx((256 * 257 / 2 + (4096 - 256) * 256) / (4096 * 4097 / 2))


@pytest.mark.parametrize(
    ("options", "topology", "why"),
    [
        (
            {"sequence": 4000},
            "v5p:2x2x2",
            "splash cannot be had: it takes sequences in multiples of 128, not 4000 queries",
        ),
        ({"dtype": jnp.float16}, "v5p:2x2x2", "it takes bfloat16 or float32, not float16"),
        ({"cap": 50.0}, "h100:1x8", r"cudnn cannot be had: it has no soft cap \(cap=50\)"),
        ({"head_dim": 512}, "h100:1x8", "at most 256 wide, not 512"),
        ({"head_dim": 100}, "v5e:2x4", "in multiples of 8, not head_dim=100"),
    ],
)
def test_what_it_cannot_do_is_said_and_left_to_xla(options: Any, topology: str, why: str) -> None:
    made = plan(*program(**options), topology=topology)
    assert made.kernels == {}
    with pytest.raises(UserError, match=why):
        raise UserError(" ".join(made.notes))
    kernel = "splash" if topology.startswith("v") else "cudnn"
    with pytest.raises(UserError, match=why):
        plan(*program(**options), topology=topology, attention=kernel)


def two_kinds(**options: Any) -> tuple[Any, Any, Any]:
    """Two calls in a layer, of which the second has what `options` say."""
    _, params, batch = program()

    def loss(params: Any, batch: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            for one in ({}, options):
                query, key, value = (
                    jnp.einsum("bse,ehd->bshd", x, w[name]) for name in ("query", "key", "value")
                )
                out = attention(query, key, value, segment_ids=batch["segments"], **one)
                x = x + jnp.einsum("bshd,hde->bse", out, w["output"])
            return x, None

        x, _ = jax.lax.scan(layer, batch["x"], params)
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    return loss, params, batch


def test_a_call_that_the_kernel_refuses_leaves_it_the_others() -> None:
    settings = {"topology": "h100:1x8", "remat": "full", "microbatches": 1}
    both = plan(*two_kinds(), **settings)
    mixed = plan(*two_kinds(cap=50.0, chunk=4096), **settings)
    plain = plan(*two_kinds(cap=50.0, chunk=4096), **settings, attention="xla")
    assert mixed.kernels == both.kernels == {"attention": {"implementation": "cudnn"}}
    (note,) = (note for note in mixed.notes if "cudnn" in note)
    assert "cannot be had for 1 of 2 calls" in note
    assert "test_attention.py" in note
    assert "it has no soft cap (cap=50); XLA computes these" in note
    seconds = [one.estimate.step_seconds for one in (both, mixed, plain) if one.estimate]
    assert seconds[0] < seconds[1] < seconds[2]
    # Half of the scores are in memory, whole as the call of the other half has them.
    work = [one.estimate.time["compute/elementwise"] for one in (both, mixed, plain) if one.estimate]
    assert work[1] - work[0] == pytest.approx((work[2] - work[0]) / 2, rel=0.1)


def test_packed_rows_that_no_kernel_of_gpus_takes_are_never_scored_whole() -> None:
    for options in ({"cap": 50.0}, {"dtype": jnp.float32}):
        made = plan(*program(**options), topology="h100:1x8", remat="none", microbatches=1)
        assert made.kernels == {}
        assert made.estimate is not None
        # Four rows a device, eight heads, 4096 queries and keys in float32, of each of four layers.
        assert made.estimate.peak_bytes < 4 * 8 * 4096**2 * 4 * 4 / 2


def test_a_window_that_layers_choose_is_left_to_xla() -> None:
    loss, params, batch = program()
    made = plan(loss, params, {**batch, "window": jax.ShapeDtypeStruct((), "int32")}, topology="v5p:2x2x2")
    assert made.kernels == {}
    assert any("its window differs from layer to layer" in note for note in made.notes)


def test_heads_cut_along_their_width_are_left_to_xla() -> None:
    loss, params, batch = program()
    names = {
        **dict.fromkeys(("query", "key", "value"), ("layers", "embed", "heads", "head_dim")),
        "output": ("layers", "heads", "head_dim", "embed"),
    }
    rules = {"head_dim": "tensor", "heads": None}
    declared = {"mesh": {"tensor": 2}, "rules": rules, "names": names}
    made = plan(loss, params, batch, topology="v5p:2x2x2", **declared)
    assert made.dims["head_dim"].axes == ("tensor",)
    assert made.kernels == {}
    assert any("needs heads whole, which tensor cuts" in note for note in made.notes)


def test_wrong_words() -> None:
    with pytest.raises(UserError, match="attention='splsh' is no kernel; did you mean 'splash'"):
        plan(*program(), topology="v5p:2x2x2", attention="splsh")
    with pytest.raises(UserError, match="'cudnn' is no kernel of v5p; known for it: splash, xla"):
        plan(*program(), topology="v5p:2x2x2", attention="cudnn")
    made = plan(*program(), topology="v5p:2x2x2").to_dict()
    for kernels, why in (
        ({"atention": {}}, "'atention' has no kernels; known: attention"),
        ({"attention": {"implementation": "flash"}}, "implementation='flash' is no kernel"),
        ({"attention": {**SPLASH["attention"], "block_q": 100}}, "block_q=100 must be a multiple of 128"),
        ({"attention": {**SPLASH["attention"], "block_k": 128}}, "splash has no 'block_k'"),
    ):
        with pytest.raises(UserError, match=why):
            Plan.from_dict({**made, "kernels": kernels})


def test_blocks_are_smaller_where_heads_are_wide() -> None:
    made = plan(*program(head_dim=256, heads=4, dtype=jnp.float32), topology="v5e:2x4")
    assert made.kernels["attention"] == {"implementation": "splash", "block_q": 512, "block_kv": 512}
    # Compiled for v4, blocks of 1024 took 18.71 MiB and those of 512 fitted.
    assert vmem_bytes(1024, 1024, head_dim=256, value_dim=256, item=4) > 18.71 * 2**20
    assert vmem_bytes(512, 512, head_dim=256, value_dim=256, item=4) < 16 * 2**20
    # With a soft cap v5e's compiler refuses blocks of 1024, 8 rows of 4096 tokens and 32 heads 128 wide.
    assert vmem_bytes(1024, 1024, head_dim=128, value_dim=128, item=2, capped=True) > 16 * 2**20
    assert vmem_bytes(512, 512, head_dim=128, value_dim=128, item=2, capped=True) < 16 * 2**20


@pytest.mark.parametrize(
    ("topology", "packed"), [("v5p:2x2x2", True), ("h100:1x8", False), ("h100:1x8", True)]
)
def test_a_result_kept_by_name_spares_the_kernel(topology: str, packed: bool) -> None:
    seconds = [
        made.estimate.time["compute/attention"]
        for remat in ("none", {"output:in": "device"}, "full")
        if (made := plan(*program(packed=packed), topology=topology, microbatches=1, remat=remat)).estimate
    ]
    # The forward work is done once more: cuDNN's gradient is two and a half times as much, splash's, whose
    # two kernels each make the scores, three and a half.
    assert seconds[1] == pytest.approx(seconds[0])
    assert seconds[2] / seconds[0] == pytest.approx(1 + 1 / (1 + (2.5 if topology == "h100:1x8" else 3.5)))


def test_more_pairs_of_blocks_than_a_chip_has_room_for_are_left_to_xla_and_told() -> None:
    loss, params, batch = program(sequence=1 << 20, heads=1, packed=False, causal=True)
    made = declare(loss, params, batch, topology="v5p:2x2x2", mesh={"data": 8})
    assert made.kernels == {}
    assert any(
        "a table of all pairs of blocks of 1,048,576 queries and 1,048,576 keys" in note
        for note in made.notes
    )
