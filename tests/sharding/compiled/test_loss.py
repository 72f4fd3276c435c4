"""What the weights of a loss cost in compiled programs: they are large, and used once a step."""

from __future__ import annotations

import functools
import statistics

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.models import decoder
from meshwright.models.transformer.config import DecoderConfig
from meshwright.sharding import plan
from meshwright.sharding.plans.estimate import Estimate
from meshwright.sharding.plans.proof import Proof
from meshwright.sharding.verify.verify import verify

EMBED, VOCAB, SEQUENCE, ROWS = 1024, 65_536, 512, 32
TABLE = EMBED * VOCAB


@functools.cache
def compiled(topology: str, fsdp: int, rows: int = ROWS, sequence: int = SEQUENCE) -> tuple[Estimate, Proof]:
    """A decoder whose output projection outweighs its layers, estimated and compiled for a slice."""
    model = decoder(
        DecoderConfig(
            layers=4,
            embed=EMBED,
            heads=8,
            kv_heads=8,
            head_dim=128,
            mlp=2048,
            vocab=VOCAB,
            max_sequence=SEQUENCE,
            compute_dtype="bfloat16",
        )
    )
    loss = jax.jit(model.loss)
    params = jax.eval_shape(jax.jit(model.init), jax.random.key(0))
    batch = {
        name: jax.ShapeDtypeStruct((rows, sequence), jnp.int32)
        for name in ("tokens", "targets", "segment_ids", "positions")
    }
    optimizer = optax.adamw(1e-3)
    made = plan(
        loss,
        params,
        batch,
        topology=topology,
        optimizer=optimizer,
        names=model.names,
        mesh={"fsdp": fsdp},
        remat="full",
        microbatches=1,
    )
    found = verify(made, loss, params, batch, optimizer, quick=True).proof
    assert made.estimate is not None
    assert found is not None
    return made.estimate, found


@pytest.mark.slow
def test_a_tpu_keeps_neither_them_nor_their_gradient_through_the_layers() -> None:
    """Nor what the loss's forward pass reads until the end."""
    _, found = compiled("v5e:4x4", 16)
    fullest = found.timeline.index(max(found.timeline))
    # Gathered in 2 bytes, summed in 4.
    assert max(found.timeline) > found.timeline[0] + 6 * TABLE
    # Behind it come the layers: of whole tables nothing is left beside what was there at first.
    assert statistics.median(found.timeline[fullest:]) < found.timeline[0] + TABLE


@pytest.mark.slow
def test_the_estimate_counts_what_is_gathered_of_them_once() -> None:
    """A second time, where logits are smaller, would be a fifth of the peak."""
    estimate, found = compiled("v5e:4x4", 16, rows=16, sequence=128)
    assert estimate.peak_bytes == pytest.approx(found.peak_bytes, rel=0.1)


@pytest.mark.slow
def test_a_gpu_gathers_them_in_two_bytes_and_scatters_their_gradient() -> None:
    _, found = compiled("h100:2x8", 16)
    of_tables = [one for one in found.collectives if one.bytes >= 0.9 * TABLE * 2 / 16]
    gathers = [one for one in of_tables if one.kind == "all_gather"]
    assert gathers
    layers = 4 * (4 * EMBED * EMBED + 3 * EMBED * 2048)
    assert sum(one.bytes for one in gathers) <= 1.05 * 2 * (2 * TABLE + 2 * layers)
    assert not [one for one in of_tables if one.kind == "all_reduce"]
