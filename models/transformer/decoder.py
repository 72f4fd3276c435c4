"""The decoder: embedding, a scan over stacked layers, last norm and logits, and the `Model` around them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...sharding.errors import UserError
from ...sharding.ops import attention
from ...sharding.ops.attention import View, attend, soft_cap
from ..flax_nnx import nnx
from ..model import Batch, Model, Params
from .attention import Attention, LatentAttention, Turn, inverse_frequencies, rotation
from .config import DecoderConfig, flops_per_token
from .experts import Experts
from .layers import Mlp, Norm, normal
from .loss import cross_entropy, logits_chunk
from .router import Routing, renewed, told


def decoder(config: DecoderConfig) -> Model:
    """Return the decoder that `config` describes, as pure functions of parameters and batch.

    Its `loss` raises `UserError` for a batch without tokens or targets, and for a sequence that learned
    positions or `loss_chunk` do not allow.

    >>> from meshwright.models import preset
    >>> model = decoder(preset("tiny", layers=2))
    >>> model.names["layers"]["mlp"]["up"]
    ('layers', 'embed', 'mlp')
    >>> tokens = jax.ShapeDtypeStruct((4, 16), "int32")
    >>> jax.eval_shape(model.logits, jax.eval_shape(model.init, jax.random.key(0)), tokens).shape
    (4, 16, 264)
    """
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    graph, state = nnx.split(abstract)
    biased = config.router_bias_rate is not None

    def init(key: jax.Array) -> Any:
        params = nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(params=key))))
        return (params, _first_bias(config)) if biased else params

    def loss(params: Params, batch: Batch, *state: Any) -> tuple[jax.Array, Any]:
        return _loss(nnx.merge(graph, params), batch, *state)

    def evaluation(params: Params, batch: Batch, *state: Any) -> tuple[jax.Array, Any]:
        return _judged(nnx.merge(graph, params), batch, *state)[:2]

    def opened(params: Any) -> tuple[Any, Any]:
        params, state = params if biased else (params, {})
        return nnx.merge(graph, params), state.get("router_bias")

    def logits(
        params: Params,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        module, bias = opened(params)
        return module.project(module(tokens, segment_ids, positions, bias)[0])

    def decode(params: Params, cache: Cache, tokens: jax.Array, index: jax.Array) -> tuple[jax.Array, Cache]:
        module, bias = opened(params)
        hidden, cache = module.step(tokens, index, cache, bias)
        return module.project(hidden)[:, 0], cache

    return Model(
        config=config,
        init=init,
        loss=loss,
        logits=logits,
        names=_names(state),
        num_parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state)),
        flops_per_token=partial(flops_per_token, config),
        has_state=biased,
        evaluation=evaluation if biased or config.balance_loss is not None else None,
        empty_cache=partial(_empty_cache, config),
        decode=decode,
    )


def _first_bias(config: DecoderConfig) -> dict[str, jax.Array]:
    """Return the state of a decoder with biased routers before its first step."""
    layers = config.layers - (config.dense_layers or 0)
    return {"router_bias": jnp.zeros((layers, config.experts or 1), jnp.float32)}


def _loss(module: Decoder, batch: Batch, state: Any = None) -> tuple[jax.Array, Any]:
    """Return what is trained on, and the auxiliaries; with a state, these and the next one."""
    loss, aux, found = _judged(module, batch, state)
    config = module.config
    if found is not None:
        aux |= jax.lax.stop_gradient(told(config, found))
        if config.balance_loss is not None:
            loss = loss + config.balance_loss * jnp.mean(found.balance)
    if state is None:
        return loss, aux
    assert found is not None
    bias = renewed(config, state["router_bias"], jnp.sum(found.load, axis=1))
    return loss, (aux, {"router_bias": bias})


def _judged(
    module: Decoder, batch: Batch, state: Any = None
) -> tuple[jax.Array, dict[str, jax.Array], Routing | None]:
    """Return the cross-entropy, its auxiliaries, and how all layers routed tokens where that is asked for."""
    for name in ("tokens", "targets"):
        if name not in batch:
            raise UserError(f"a batch needs {name!r}; it has {', '.join(map(repr, batch)) or 'nothing'}")
    tokens, targets, segment_ids = batch["tokens"], batch["targets"], batch.get("segment_ids")
    if segment_ids is not None:
        targets = jnp.where(segment_ids > 0, targets, -1)
    config = module.config
    bias = None if state is None else state["router_bias"]
    hidden, found = module(tokens, segment_ids, batch.get("positions"), bias)
    batch_size, sequence = tokens.shape
    chunk = logits_chunk(batch_size, sequence, config.vocab, config.loss_chunk)
    loss, aux = cross_entropy(hidden, module.project, targets, chunk=chunk, z_loss=config.z_loss)
    return loss, aux, found


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


class Decoder(nnx.Module):
    """A decoder-only transformer whose layers are one `Block` with a leading layers dimension.

    A mixture of experts whose first layers have none has two such blocks. A stacked block is traced, compiled
    and read by the planner once, whatever the number of layers.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        embed, vocab = config.embed, config.vocab
        self.table = normal(rngs.params(), (vocab, embed), ("vocab", "embed"), config, fan_in=embed)
        if config.position_embedding == "learned":
            shape = (config.max_sequence, embed)
            self.positions = normal(
                rngs.params(), shape, ("sequence", "embed"), config, fan_in=embed, gain=0.5
            )
        keys = jax.random.split(rngs.params(), config.layers)
        dense = config.dense_layers or 0
        if dense:
            self.dense = _stacked(config, keys[:dense], dense=True)
        self.layers = _stacked(config, keys[dense:])
        self.final_norm = Norm(config)
        if not config.tied_embeddings:
            self.unembed = normal(rngs.params(), (embed, vocab), ("embed", "vocab"), config, fan_in=embed)

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing | None]:
        """Return the normalised stream ``[batch, sequence, embed]`` that `project` turns into logits.

        And how each layer with experts routed tokens, where that is asked for. `bias` ``[layers, experts]``
        is that of their routers.
        """
        sequence = tokens.shape[1]
        if self.config.position_embedding == "learned" and sequence > self.config.max_sequence:
            raise UserError(f"sequence={sequence} is longer than max_sequence={self.config.max_sequence}")
        index = jnp.arange(sequence, dtype=jnp.int32)
        view = View(index, index, segment_ids, segment_ids)

        def layer(graph: Any, x: jax.Array, xs: tuple[Any, Any, Any]) -> tuple[jax.Array, Routing | None]:
            parameters, is_global, own = xs
            turn, window = self._layer_view(turns, is_global, sequence)
            return nnx.merge(graph, parameters)(x, turn, view._replace(window=window), own)

        positions = index if positions is None else positions
        turns = self._turns(positions)
        x, found = self._embed(tokens, positions), None
        for stack in self._stacks():
            graph, stacked = nnx.split(stack)
            own = bias if stack is self.layers else None
            x, found = jax.lax.scan(partial(layer, graph), x, (stacked, self._globals(), own))
        return self.final_norm(x), found

    def step(
        self, tokens: jax.Array, index: jax.Array, cache: Cache, bias: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Feed tokens ``[batch]`` at place `index`; return the stream ``[batch, 1, embed]`` and the cache."""
        length = cache.key.shape[2]
        place = jnp.reshape(index, (1,)).astype(jnp.int32)
        view = View(place, jnp.arange(length, dtype=jnp.int32))

        def layer(graph: Any, x: jax.Array, xs: tuple[Any, Any, Any, Cache]) -> tuple[jax.Array, Cache]:
            parameters, is_global, own, old = xs
            turn, window = self._layer_view(turns, is_global, length)
            return nnx.merge(graph, parameters).step(x, turn, view._replace(window=window), old, own)

        turns = self._turns(place)
        x, caches, first = self._embed(tokens[:, None], place), [], 0
        for stack in self._stacks():
            graph, stacked = nnx.split(stack)
            after = first + jax.tree.leaves(stacked)[0].shape[0]
            part = jax.tree.map(lambda rows, start=first, stop=after: rows[start:stop], cache)
            own = bias if stack is self.layers else None
            x, part = jax.lax.scan(partial(layer, graph), x, (stacked, self._globals(), own, part))
            caches.append(part)
            first = after
        cache = caches[0] if len(caches) == 1 else jax.tree.map(lambda *rows: jnp.concatenate(rows), *caches)
        return self.final_norm(x), cache

    def project(self, x: jax.Array) -> jax.Array:
        """Return float32 logits ``[..., vocab]`` of the stream ``[..., embed]``."""
        if self.config.tied_embeddings:
            table = self.table[...].astype(x.dtype)
            logits = jnp.einsum("...e,ve->...v", x, table, preferred_element_type=jnp.float32)
        else:
            table = self.unembed[...].astype(x.dtype)
            logits = jnp.einsum("...e,ev->...v", x, table, preferred_element_type=jnp.float32)
        return soft_cap(logits, self.config.final_soft_cap)

    def _stacks(self) -> tuple[Block, ...]:
        """Return the stacks of layers in order: those with an MLP before those with experts."""
        return (self.dense, self.layers) if self.config.dense_layers else (self.layers,)

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        config = self.config
        # A token that is not in the vocabulary reads NaN, so that the loss says so; clamping would hide it.
        look_up = {"mode": "fill", "fill_value": jnp.nan, "wrap_negative_indices": False}
        x = self.table[...].astype(config.compute_dtype).at[tokens].get(**look_up)
        if config.scale_embeddings:
            x = x * jnp.asarray(config.embed**0.5, x.dtype)
        if config.position_embedding == "learned":
            x = x + self.positions[...].at[positions].get(**look_up).astype(x.dtype)
        return x

    def _turns(self, positions: jax.Array) -> tuple[Turn, ...]:
        """Return the rotations of global and, where they differ, of local layers."""
        config = self.config
        if config.position_embedding == "learned":
            return ()
        turns = (rotation(positions, inverse_frequencies(config)),)
        if config.rope_local_theta is not None:
            turns += (rotation(positions, inverse_frequencies(config, local=True)),)
        return turns

    def _globals(self) -> np.ndarray | None:
        """Return which layers ignore the window, bool ``[layers]``; None when all layers are alike."""
        if self.config.global_every is None:
            return None
        return np.arange(1, self.config.layers + 1) % self.config.global_every == 0

    def _layer_view(
        self, turns: tuple[Turn, ...], is_global: jax.Array | None, keys: int
    ) -> tuple[Turn | None, jax.Array | int | None]:
        """Return a layer's rotation and window; None is no limit."""
        window = self.config.window
        turn = turns[0] if turns else None
        if is_global is not None and window is not None:
            if len(turns) == 2:
                cos, sin = (jnp.where(is_global, far, near) for far, near in zip(*turns, strict=True))
                turn = (cos, sin)
            return turn, jnp.where(is_global, keys, window)
        return turn, window if window is not None and window < keys else None


def _stacked(config: DecoderConfig, keys: jax.Array, *, dense: bool = False) -> Block:
    """Return one block whose parameters have a leading dimension, as many as there are keys.

    Made in a loop, so that random bits exist for one layer at a time.
    """

    def block(key: jax.Array) -> Block:
        return Block(config, rngs=nnx.Rngs(params=key), dense=dense)

    graph = nnx.graphdef(nnx.eval_shape(block, keys[0]))
    return nnx.merge(graph, jax.lax.map(lambda key: nnx.to_pure_dict(nnx.state(block(key))), keys))


class Cache(NamedTuple):
    """Keys and values of a row so far, ``[batch, length, kv_heads, head_dim]`` (stacked: layers first)."""

    key: jax.Array
    value: jax.Array


class Block(nnx.Module):
    """A decoder layer. `Decoder` holds all of them stacked in one.

    `dense` layers have an MLP where the others have experts.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dense: bool = False):
        self.config = config
        self.attention_norm = Norm(config)
        latent = config.kv_rank is not None
        self.attention = (LatentAttention if latent else Attention)(config, rngs=rngs)
        self.mlp_norm = Norm(config)
        mixture = config.experts is not None and not dense
        self.mlp = (Experts if mixture else Mlp)(config, rngs=rngs)
        if config.post_norms:
            self.attention_post_norm = Norm(config)
            self.mlp_post_norm = Norm(config)

    def __call__(
        self, x: jax.Array, turn: Turn | None, view: View, bias: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        """Map the stream ``[batch, sequence, embed]`` to itself; every row sees what `view` lets it.

        And say how experts were chosen, with the router's `bias`, where that is asked for.
        """
        query, key, value = self.attention.project(self.attention_norm(x), turn)
        out = attention(
            query,
            key,
            value,
            segment_ids=view.query_segments,
            window=view.window,
            cap=self.config.attention_soft_cap,
            scale=1.0,
            chunk=self.config.attention_chunk,
        )
        return self._finish(x, out, bias, view.query_segments)

    def step(
        self, x: jax.Array, turn: Turn | None, view: View, cache: Cache, bias: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Map one token of each row ``[batch, 1, embed]``, seeing those that the cache holds."""
        query, key, value = self.attention.project(self.attention_norm(x), turn)
        place = (0, view.query_index[0], 0, 0)
        cache = Cache(
            *(
                jax.lax.dynamic_update_slice(old, new, place)
                for old, new in zip(cache, (key, value), strict=True)
            )
        )
        out = attend(query, cache.key, cache.value, view, cap=self.config.attention_soft_cap)
        return self._finish(x, out, bias)[0], cache

    def _finish(
        self, x: jax.Array, heads: jax.Array, bias: jax.Array | None, segments: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        post = self.config.post_norms
        out = self.attention.merge(heads)
        x = x + (self.attention_post_norm(out) if post else out)
        wide, found = self.mlp_norm(x), None
        if isinstance(self.mlp, Experts):
            out, found = self.mlp(wide, bias, segments)
        else:
            out = self.mlp(wide)
        return x + (self.mlp_post_norm(out) if post else out), found
