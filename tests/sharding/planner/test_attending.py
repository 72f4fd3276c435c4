"""Each call of attention is priced by what carries it out, whatever other calls a program has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from meshwright.sharding import Plan, declare
from meshwright.sharding.cost import pieces
from meshwright.sharding.cost.calibration import calibration_for, read_toml
from meshwright.sharding.ops import attention

NAMES = dict.fromkeys(("query", "key", "value"), ("embed", "heads", "head_dim"))
NAMES["output"] = ("heads", "head_dim", "embed")
SHAPE = (2, 8192, 64)


def loss_of(*calls: dict[str, Any]) -> Any:
    """Return a loss with a layer for each call of attention."""

    def loss(params: Any, batch: Any) -> Any:
        x = batch["x"]
        for options in calls:
            arrays = (jnp.einsum("bse,ehd->bshd", x, params[name]) for name in ("query", "key", "value"))
            out = with_bias(*arrays, x, **options) if "bias_of" in options else attention(*arrays, **options)
            x = x + jnp.einsum("bshd,hde->bse", out, params["output"])
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    return loss


def with_bias(query: Any, key: Any, value: Any, x: Any, *, bias_of: Any) -> Any:
    """Return attention as a user writes it: only then a bias is seen to be made of positions."""
    return jax.nn.dot_product_attention(query, key, value, bias=bias_of(x))


def planned(*calls: dict[str, Any], **asked: Any) -> Plan:
    shape = jax.ShapeDtypeStruct
    params = dict.fromkeys(("query", "key", "value"), shape((64, 8, 64), "bfloat16"))
    params["output"] = shape((8, 64, 64), "bfloat16")
    batch = {"x": shape(SHAPE, "bfloat16")}
    return declare(loss_of(*calls), params, batch, names=NAMES, remat="none", **asked)


def attending(*calls: dict[str, Any], **asked: Any) -> float:
    estimate = planned(*calls, **asked).estimate
    assert estimate is not None
    return estimate.time["compute/attention"]


LOCAL, GLOBAL, BOTH_WAYS, CAPPED = {"window": 512}, {}, {"causal": False}, {"cap": 30.0}


@pytest.mark.parametrize(
    ("topology", "mesh", "way"),
    [
        # Blocks of neighbours and of a ring, or cuDNN's kernel of heads; splash of neighbours and of a ring.
        ("h100:1x8", {"context": 8}, "ring"),
        ("h100:1x8", {"context": 8}, "heads"),
        ("v5e:2x4", {"context": 8}, "ring"),
        ("h100:1x1", {"data": 1}, None),
        ("v5e:1x1", {"data": 1}, None),
    ],
)
def test_calls_of_several_kinds_take_what_each_takes_alone(
    topology: str, mesh: dict[str, int], way: str | None
) -> None:
    asked = {"topology": topology, "mesh": mesh, "context": way}
    kinds = (LOCAL, GLOBAL, BOTH_WAYS)
    # What a window reaches is fetched whatever the word, and no other word is taken for it alone.
    words = ("neighbours" if way else None, way, way)
    alone = [attending(kind, **asked | {"context": word}) for kind, word in zip(kinds, words, strict=True)]
    assert len(set(alone)) == len(kinds)
    assert attending(*kinds, **asked) == pytest.approx(sum(alone), rel=1e-9)


def test_blocks_on_a_gpu_take_the_bytes_of_their_turns() -> None:
    found = attending(
        BOTH_WAYS, topology="h100:1x8", mesh={"context": 8}, context="gathered", attention="xla"
    )
    # A device's 1,024 queries in two blocks, against 8,192 keys in sixteen; two rows of eight heads of 64.
    turns, scores, rows = 2 * 16, 2 * 8 * 512 * 512, 2 * 8 * 512 * 64
    forward = (12 + 2 * 2) * scores + 3 * 2 * 3 * rows + 28 * rows
    backward = (16 + 5 * 2) * scores + (4 * 2 + 16) * 2 * rows + 4 * 2 * rows + (3 * 2 + 16) * rows
    # Around them all queries and results, and eight times as many keys and values.
    around = 1024 * 2 * 8 * 64 * ((2 * 2 * 17 + 8 + 3 * 2) + ((8 + 5 * 2) * 17 + 4 * 2))
    rate = 3.35e12 * calibration_for("h100").memory_efficiency
    assert found == pytest.approx((turns * (forward + backward) + around) / rate, rel=1e-3)


def slopes(x: Any) -> Any:
    place = jnp.arange(x.shape[1])
    return -jnp.arange(1.0, 9.0)[None, :, None, None] * jnp.abs(place[:, None] - place)


def buckets(x: Any) -> Any:
    place = jnp.arange(x.shape[1])
    behind = jnp.clip(place[:, None] - place, -8, 7) + 8
    return jnp.take(jnp.arange(128.0).reshape(16, 8), behind, axis=0).transpose(2, 0, 1)[None]


def of_a_bias(topology: str) -> tuple[float, float]:
    """Return the seconds of one turn that a bias adds, of slopes and of a table of distances."""
    asked = {"topology": topology, "mesh": {"context": 8}, "context": "gathered", "attention": "xla"}
    found = (attending(one, **asked) for one in (BOTH_WAYS, {"bias_of": slopes}, {"bias_of": buckets}))
    none, by_slopes, by_buckets = (one / 32 for one in found)
    return by_slopes - none, by_buckets - none


def test_a_bias_on_a_gpu_takes_the_bytes_that_lay_it_out_and_those_that_it_learns_of() -> None:
    by_slopes, by_buckets = of_a_bias("h100:1x8")
    rate = 3.35e12 * calibration_for("h100").memory_efficiency
    learnt = 8 * 2 * 8 * 512 * 512
    # Two rows, four, … of all 1,023 distances but the first, the first three, …; no batch.
    laid = 8 * sum(2**n * (1024 - 2**n) for n in range(1, 10))
    assert by_slopes == pytest.approx(learnt / rate, rel=1e-3)
    assert by_buckets == pytest.approx((learnt + 2 * 8 * laid) / rate, rel=1e-3)


@pytest.mark.parametrize(("chip", "topology"), [("v5e", "v5e:2x4"), ("v5p", "v5p:2x2x2")])
def test_a_bias_on_a_tpu_takes_its_cycles(chip: str, topology: str) -> None:
    by_slopes, by_buckets = of_a_bias(topology)
    known = read_toml(Path(pieces.__file__).with_name("turns.toml"))[chip]
    scores = 2 * 8 * 512 * 512
    assert by_slopes == pytest.approx(1e-12 * sum(known["added"]) * scores, rel=1e-3)
    laid = 1e-12 * sum(known["laid"]) * scores / 2
    assert by_buckets == pytest.approx(by_slopes + laid, rel=1e-3)


def test_blocks_on_a_tpu_copy_two_bytes_as_slowly_as_four() -> None:
    """A ring has as many turns as gathered keys: what differs are copies of keys and their gradients."""
    asked: dict[str, Any] = {"topology": "v5e:2x4", "mesh": {"context": 8}, "attention": "xla"}
    ring, gathered = (attending(BOTH_WAYS, context=way, **asked) for way in ("ring", "gathered"))
    # Keys and values of a device are put in blocks as they come, rather than all of them at first.
    array, rate = 2 * 1024 * 8 * 64, 819e9 * calibration_for("v5e").fusion_efficiency
    chunks = 7 * 2 * array * (2 * 4 + 2 * 4 + 22)
    around = 7 * 2 * array * (2 * 4 + 8 + 5 * 4)
    assert ring - gathered == pytest.approx((chunks - around) / rate, rel=1e-3)


def test_a_kernel_s_window_is_that_of_a_device_with_neighbours() -> None:
    found = attending(LOCAL, topology="v5e:2x4", mesh={"context": 8}, context="neighbours")
    products = 2 * 8 * 1024 * 512 * 2 * (64 + 64)
    rate = 197e12 * calibration_for("v5e", "splash").attention_efficiency
    assert found == pytest.approx((1 + 3.5) * products / rate, rel=1e-3)


def test_a_ring_of_a_kernel_s_pieces_takes_what_merging_them_moves() -> None:
    asked = {"topology": "v5e:2x4", "mesh": {"context": 8}}
    ring, heads = (attending(BOTH_WAYS, context=way, **asked) for way in ("ring", "heads"))
    # Seven chunks that come: arrays of two rows of 1,024 tokens, eight heads of 64, in two bytes.
    array = 2 * 1024 * 8 * 64
    forward = 3 * 4 + 2 * 4 + (2 + 4 + 12) + 4 * 128 / 64
    backward = 5 * 4 + 2 * 4 + 4 + 3 * (2 + 4 + 12)
    rate = 819e9 * calibration_for("v5e").fusion_efficiency
    assert ring - heads == pytest.approx(7 * (forward + backward) * array / rate, rel=1e-3)


def test_keys_and_values_that_a_kernel_reads_gathered_are_kept_so_on_tpus() -> None:
    def kept(topology: str, way: str) -> float:
        estimate = planned(BOTH_WAYS, topology=topology, mesh={"context": 8}, context=way).estimate
        assert estimate is not None
        return estimate.memory["saved_activations"]

    # Two rows of 1,024 tokens of a device, eight heads of 64 in two bytes: seven times as much beside them.
    part = 2 * 1024 * 8 * 64 * 2
    assert kept("v5e:2x4", "gathered") - kept("v5e:2x4", "heads") == 7 * 2 * part
    assert kept("h100:1x8", "gathered") == kept("h100:1x8", "heads")


def test_a_call_that_the_kernel_does_not_take_is_blocks_beside_one_that_it_takes() -> None:
    asked = {"topology": "h100:1x8", "mesh": {"context": 8}, "context": "heads"}
    alone = attending(GLOBAL, **asked), attending(CAPPED, **asked)
    # cuDNN has no soft cap, and blocks move their scores.
    assert alone[1] > 3 * alone[0]
    assert attending(GLOBAL, CAPPED, **asked) == pytest.approx(sum(alone), rel=1e-9)


def test_long_sequences_are_run_again_by_no_kernel() -> None:
    # Plain attention goes over a long sequence in chunks, each run again for its gradient.
    short, long = (
        attending({"chunk": chunk, "causal": False}, topology="h100:1x1", mesh={"data": 1})
        for chunk in (8192, 1024)
    )
    assert long == pytest.approx(short, rel=1e-9)


def latents(params: Any, batch: Any) -> Any:
    """Queries of six latents see the data, then themselves."""
    x = jnp.broadcast_to(params["latents"], (batch["x"].shape[0], 6, 64))
    for seen in (batch["x"], x):
        arrays = (
            jnp.einsum("bse,ehd->bshd", source, params[name])
            for name, source in (("query", x), ("key", seen), ("value", seen))
        )
        x = x + jnp.einsum("bshd,hde->bse", attention(*arrays, causal=False), params["output"])
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def test_queries_that_do_not_lie_over_context_are_told_with_their_line_and_the_reason() -> None:
    shape = jax.ShapeDtypeStruct
    params = dict.fromkeys(("query", "key", "value"), shape((64, 8, 64), "float32"))
    params |= {"output": shape((8, 64, 64), "float32"), "latents": shape((6, 64), "float32")}
    batch = {"x": shape((4, 32, 64), "float32")}
    made = declare(latents, params, batch, topology="cpu:8", mesh={"context": 4, "data": 2})
    said = [note for note in made.notes if "queries on every device" in note]
    assert len(said) == 2
    assert all(note.startswith("1 of 2 calls of attention (") for note in said)
    assert all("test_attending.py:" in note for note in said)
    assert said[0].endswith(
        "its keys lie over context and its queries do not: XLA sums what each device has of them"
    )
    assert said[1].endswith("context=4 does not divide 6 queries; nearest: 4 or 8")
    assert not any("gathers keys" in note for note in made.notes)


def test_what_pairs_of_queries_and_keys_have_is_told_with_its_size() -> None:
    bias = {"bias": jnp.zeros((1, 8, 64, 64))}

    def said(*calls: dict[str, Any]) -> str:
        shape = jax.ShapeDtypeStruct
        params = dict.fromkeys(("query", "key", "value"), shape((64, 8, 64), "float32"))
        params |= {"output": shape((8, 64, 64), "float32")}
        batch = {"x": shape((4, 64, 64), "float32")}
        mesh = {"context": 4, "data": 2}
        made = declare(loss_of(*calls), params, batch, topology="cpu:8", names=NAMES, mesh=mesh)
        return next(note for note in made.notes if "of all queries and keys" in note)

    pairs = "has a bias of all queries and keys (1 x 8 x 64 x 64, 0.1 MiB in all), of which a device has its"
    assert said(bias) == f"attention {pairs} queries' part"
    assert said(bias | {"sink": jnp.zeros(8)}) == f"attention {pairs} queries' part"
    assert said(GLOBAL, bias) == f"1 of 2 calls of attention {pairs} queries' part"


def test_arrays_of_pairs_are_priced_where_they_are_read_moved_and_learnt() -> None:
    shape = jax.ShapeDtypeStruct

    def estimate(asked: dict[str, Any]) -> Any:
        params = dict.fromkeys(("query", "key", "value"), shape((64, 8, 64), "float32"))
        params |= {"output": shape((8, 64, 64), "float32")}
        batch = {"x": shape((4, 512, 64), "float32")}
        mesh = {"context": 4, "data": 2}
        told = {"topology": "v5e:2x4", "names": NAMES, "mesh": mesh, "context": "ring"}
        return declare(loss_of(asked), params, batch, **told).estimate

    plain, biased = estimate({}), estimate({"bias": jnp.zeros((1, 8, 512, 512))})
    # A device has a quarter of it: as it is read, its gradient as it is summed and as it is handed on.
    part = 4 * 8 * 512 * 512 / 4
    assert biased.memory["communication"] >= plain.memory["communication"] + 2.9 * part
    assert biased.time["all_to_all/context"] > plain.time["all_to_all/context"]
    assert biased.step_seconds > plain.step_seconds
