"""The decoder of a measured row, traced once for each architecture and batch."""

from __future__ import annotations

import functools

from meshwright.sharding.cost.profile import Profile, profile
from meshwright.sharding.program import Program

from .rows import Architecture


@functools.cache
def traced(arch: Architecture) -> tuple[Program, Profile]:
    """Return the program of the decoder's loss, and its tables."""
    import jax
    import jax.numpy as jnp

    from meshwright.sharding.program import trace

    model, params = _model(arch)
    shape = jax.ShapeDtypeStruct((arch.batch, arch.sequence), jnp.int32)
    program = trace(model.loss, params, {"targets": shape, "tokens": shape}, names=model.names)
    return program, profile(program)


def _model(arch: Architecture) -> tuple:
    from dataclasses import replace

    return _built(replace(arch, batch=1))


@functools.cache
def _built(arch: Architecture) -> tuple:
    import jax

    from meshwright.models.transformer.build import decoder
    from meshwright.models.transformer.config import DecoderConfig

    old = not arch.gated
    config = DecoderConfig(
        layers=arch.layers,
        embed=arch.embed,
        heads=arch.heads,
        kv_heads=arch.kv_heads,
        head_dim=arch.embed // arch.heads // 2 * 2,
        mlp=arch.mlp,
        vocab=arch.vocab,
        max_sequence=arch.sequence,
        activation="swiglu" if arch.gated else "gelu",
        bias="all" if old else "none",
        norm="layer" if old else "rms",
        tied_embeddings=arch.tied,
        position_embedding="learned" if old else "rope",
        param_dtype="bfloat16",
        attention_chunk=arch.sequence,
        loss_chunk=arch.sequence,
    )
    model = decoder(config)
    return model, jax.eval_shape(model.init, jax.random.key(0))
