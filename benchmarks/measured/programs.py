"""The decoder of a measured row, traced once for each architecture and scaled to the row's batch."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np
from meshwright.sharding.cost.profile import ProgramTables, profile
from meshwright.sharding.program import Program

from .shapes import Architecture

if TYPE_CHECKING:
    from meshwright.models.transformer.config import DecoderConfig

# Any batch will do: all of a decoder's arrays and products grow with it in proportion.
_BATCH = 8


@functools.cache
def traced(arch: Architecture) -> tuple[Program, ProgramTables]:
    """Return the program of the decoder's loss (at some batch), and its tables at the batch of `arch`."""
    program, tables = _traced(dataclasses.replace(arch, batch=_BATCH))
    return program, _scaled(tables, program.batch_dims[0], arch.batch / _BATCH)


def _scaled(tables: ProgramTables, dim: int, times: float) -> ProgramTables:
    """Return `tables` with the dim made `times` as large."""
    sizes = tables.dim_sizes.copy()
    sizes[dim] *= times
    values, products = tables.values, tables.products
    has = products.role_dims[:, :, dim]
    return dataclasses.replace(
        tables,
        dim_sizes=sizes,
        values=dataclasses.replace(values, bytes=values.bytes * np.where(values.dims[:, dim], times, 1.0)),
        products=dataclasses.replace(
            products,
            flops=products.flops * np.where(has.any(axis=1), times, 1.0),
            role_sizes=products.role_sizes * np.where(has, times, 1.0),
        ),
    )


@functools.cache
def _traced(arch: Architecture) -> tuple[Program, ProgramTables]:
    import jax
    import jax.numpy as jnp
    from meshwright.models.transformer.decoder import decoder
    from meshwright.sharding.program import trace

    model = decoder(decoder_config(arch))
    params = jax.eval_shape(model.init, jax.random.key(0))
    shape = jax.ShapeDtypeStruct((arch.batch, arch.sequence), jnp.int32)
    program = trace(model.loss, params, {"targets": shape, "tokens": shape}, names=model.names)
    return program, profile(program)


def decoder_config(arch: Architecture) -> DecoderConfig:
    """Return the decoder of a measured row, attention and loss in one piece, in bfloat16."""
    from meshwright.models.transformer.config import DecoderConfig

    plain = not arch.gated
    return DecoderConfig(
        layers=arch.layers,
        embed=arch.embed,
        heads=arch.heads,
        kv_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        mlp=arch.mlp,
        vocab=arch.vocab,
        max_sequence=arch.sequence,
        activation="gelu" if plain else "swiglu",
        bias="all" if plain else "none",
        norm="layer" if plain else "rms",
        tied_embeddings=arch.tied,
        position_embedding="learned" if plain else "rope",
        param_dtype="bfloat16",
        **dict(arch.extra),
        attention_chunk=arch.sequence,
        loss_chunk=arch.sequence,
    )
