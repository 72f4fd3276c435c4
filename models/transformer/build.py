"""From a config to the `Model` that everything else handles."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ...sharding.errors import UserError
from ..model import Batch, Model, Params
from .block import Cache
from .config import DecoderConfig
from .decoder import Decoder
from .flops import flops_per_token
from .loss import cross_entropy, logits_chunk


def decoder(config: DecoderConfig) -> Model:
    """Return the decoder that `config` describes, as pure functions of parameters and batch."""
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    graph, state = nnx.split(abstract)

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key))))

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return _loss(nnx.merge(graph, params), batch)

    def logits(
        params: Params,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        module = nnx.merge(graph, params)
        return module.project(module(tokens, segment_ids, positions))

    def decode(params: Params, cache: Cache, tokens: jax.Array, index: jax.Array) -> tuple[jax.Array, Cache]:
        module = nnx.merge(graph, params)
        hidden, cache = module.step(tokens, index, cache)
        return module.project(hidden)[:, 0], cache

    return Model(
        config=config,
        init=init,
        loss=loss,
        logits=logits,
        names=_names(state),
        num_parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state)),
        flops_per_token=partial(flops_per_token, config),
        empty_cache=partial(_empty_cache, config),
        decode=decode,
    )


def _loss(module: Decoder, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    for name in ("tokens", "targets"):
        if name not in batch:
            raise UserError(f"a batch needs {name!r}; it has {', '.join(map(repr, batch)) or 'nothing'}")
    tokens, targets, segment_ids = batch["tokens"], batch["targets"], batch.get("segment_ids")
    if segment_ids is not None:
        targets = jnp.where(segment_ids > 0, targets, -1)
    config = module.config
    hidden = module(tokens, segment_ids, batch.get("positions"))
    batch_size, sequence = tokens.shape
    chunk = logits_chunk(batch_size, sequence, config.vocab, config.loss_chunk)
    return cross_entropy(hidden, module.project, targets, chunk=chunk, z_loss=config.z_loss)


def _empty_cache(config: DecoderConfig, batch: int, length: int) -> Cache:
    shape = (config.layers, batch, length, config.kv_heads)
    sizes = (config.head_dim + (config.rope_head_dim or 0), config.value_head_dim or config.head_dim)
    return Cache(*(jnp.zeros((*shape, size), config.compute_dtype) for size in sizes))


def _names(state: nnx.State) -> dict[str, Any]:
    """Return the labels of each parameter, with the stacked dimension put before those inside stacks."""
    flat = {path: leaf.get_metadata("dims") for path, leaf in nnx.to_flat_state(state)}
    labelled = {
        path: ("layers", *dims) if path[0] in ("layers", "dense") else dims for path, dims in flat.items()
    }
    return nnx.traversals.unflatten_mapping(labelled)
