"""What moves where experts and rows share an axis."""

from __future__ import annotations

import dataclasses

import jax
import optax
from meshwright.models import decoder
from meshwright.models.transformer.config import DecoderConfig
from meshwright.sharding import declare, plan

CONFIG = DecoderConfig(
    layers=4,
    embed=512,
    heads=8,
    kv_heads=8,
    head_dim=64,
    mlp=1024,
    vocab=1024,
    max_sequence=256,
    experts=16,
    experts_per_token=2,
    expert_mlp=1024,
)


def test_tokens_go_to_their_experts_and_back_by_all_to_alls() -> None:
    model = decoder(CONFIG)
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = {key: jax.ShapeDtypeStruct((64, 256), "int32") for key in ("tokens", "targets")}
    made = plan(
        model.loss,
        params,
        batch,
        topology="h100:8",
        optimizer=optax.adam(1e-3),
        names=model.names,
        mesh={"expert": 8},
        remat="none",
    )
    assert made.estimate is not None
    time = made.estimate.time
    assert made.batch["tokens"].spec[0] == "expert"
    assert made.params["layers/mlp/up"].spec[1] == "expert"
    assert "all_gather/expert" not in time
    # To the experts and back, forward and backward, with a quarter's room: 7/8 of it each.
    stream = CONFIG.layers * 64 * 256 * CONFIG.embed * 2 / 8
    least = 2 * (2.5 + 2.0) * stream * 7 / 8 / 450e9
    assert least < time["all_to_all/expert"] < 3 * least


def test_no_mask_of_segments_moves_where_heads_and_sequence_share_an_axis() -> None:
    """Attention in chunks has a mask of each chunk by all keys, made of ids where a kernel reads it."""
    config = dataclasses.replace(
        CONFIG, max_sequence=8192, experts=None, experts_per_token=None, expert_mlp=None, layers=2
    )
    model = decoder(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    sent = []
    for keys in (("tokens", "targets"), ("tokens", "targets", "segment_ids", "positions")):
        batch = {key: jax.ShapeDtypeStruct((2, 8192), "int32") for key in keys}
        told = {"names": model.names, "mesh": {"tensor": 8}, "rules": {"sequence": "tensor"}}
        made = declare(model.loss, params, batch, topology="h100:8", **told)
        assert made.estimate is not None
        sent.append(made.estimate.time["all_gather/tensor"])
    assert sent[1] < 1.05 * sent[0]
