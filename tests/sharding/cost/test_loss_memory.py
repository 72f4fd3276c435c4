"""Bytes at the moments of a loss over parts of the batch, as compilers for GPUs and TPUs hold it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from meshwright.sharding import Topology
from meshwright.sharding.cost import Calibration, Candidate, Pricer, memory
from meshwright.sharding.program import trace

DEPTH, EMBED, INNER, IDS, ROWS, PARTS = 2, 64, 256, 4096, 512, 4
STREAM, LOGITS = 2 * ROWS * EMBED, 4 * ROWS // PARTS * IDS
TABLE = IDS * EMBED


def loss(params: Any, ids: Any, targets: Any, tied: bool) -> Any:
    """Layers, a norm in float32, and logits of a part of the rows at a time, compared with their numbers."""

    def body(x: Any, p: Any) -> tuple[Any, None]:
        return x + jnp.tanh(x @ p["up"].astype("bfloat16")) @ p["down"].astype("bfloat16"), None

    x = jax.lax.scan(body, params["table"].astype("bfloat16")[ids], params["layers"])[0]
    wide = x.astype("float32")
    x = (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True))).astype("bfloat16")
    head = params["table" if tied else "head"].astype("bfloat16")

    @jax.checkpoint
    def add(total: Any, part: Any) -> tuple[Any, None]:
        logits = jnp.einsum("re,ve->rv", part[0], head, preferred_element_type="float32")
        numbers = jax.lax.broadcasted_iota("int32", logits.shape, 1)
        picked = jnp.where(numbers == part[1][:, None], logits, 0.0).sum(-1)
        return total + jnp.sum(jax.nn.logsumexp(logits, -1) - picked), None

    parts = x.reshape(PARTS, -1, EMBED), targets.reshape(PARTS, -1)
    return jax.lax.scan(add, 0.0, parts)[0] / ROWS


def moments_of(topology: str, *, tied: bool = False) -> list[dict[str, float]]:
    """Return the moments of the one device of `topology` whose layers are run again, first to last."""
    shape = jax.ShapeDtypeStruct
    layers = {"down": shape((DEPTH, INNER, EMBED), "float32"), "up": shape((DEPTH, EMBED, INNER), "float32")}
    params = {"layers": layers, "table": shape((IDS, EMBED), "float32")}
    if not tied:
        params["head"] = shape((IDS, EMBED), "float32")
    batch = {name: shape((ROWS,), "int32") for name in ("ids", "targets")}
    program = trace(lambda p, b: loss(p, b["ids"], b["targets"], tied), params, batch)
    pricer = Pricer(program, Topology.parse(topology), optimizer_slots=8.0, calibration=Calibration())
    candidate = Candidate(mesh={"data": 1}, dims={}, remat="full")
    placement = pricer.place(candidate)
    over = pricer.stored_over(candidate, placement)
    standing = memory.standing(pricer.profile, placement, candidate, over, 8.0, None, 1)
    work, kept = pricer.worked(placement, candidate.mesh), pricer.kept(candidate)
    return list(memory.moments(pricer.profile, candidate, standing, work, kept, False))


def test_numbers_of_a_vocabulary_lie_beside_logits_before_gradients_where_gpus_hold_them():
    ahead, back, *_ = moments_of("h100:1")
    assert (ahead["temporaries"], ahead["gradients"]) == (2 * LOGITS, 0.0)
    # Then the gradient of logits in bfloat16, as their product takes it, and that of what the parts are of.
    assert back["temporaries"] == 1.5 * LOGITS + STREAM
    assert back["gradients"] == 4 * TABLE


def test_tpus_make_numbers_again_and_gradients_within_products():
    back, layers, *_ = moments_of("v5p:1x1x1")
    assert back["temporaries"] == LOGITS + STREAM
    assert layers["temporaries"] < LOGITS


@pytest.mark.parametrize("topology", ["h100:1", "v5p:1x1x1"])
def test_of_a_float32_norm_after_the_layers_what_it_took_is_kept(topology):
    *_, back, layers, _ = moments_of(topology)
    # The stream after the layers, and its norm, which the loop reads; a number of each row.
    assert back["saved_activations"] - layers["saved_activations"] == pytest.approx(
        2 * STREAM + 4 * ROWS, abs=8 * ROWS
    )


@pytest.mark.parametrize(("topology", "tables"), [("h100:1", 2), ("v5p:1x1x1", 1)])
def test_zeros_of_a_tables_two_gradients_are_made_together_on_gpus(topology, tables):
    *_, back, layers, table = moments_of(topology, tied=True)
    assert back["gradients"] == tables * 4 * TABLE
    assert layers["gradients"] - back["gradients"] == 4 * DEPTH * 2 * EMBED * INNER
    assert table["gradients"] == 4 * (TABLE + DEPTH * 2 * EMBED * INNER)
