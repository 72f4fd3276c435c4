"""Text from a model: one token after another, in one compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..sharding.errors import UserError
from .model import Model, Params


def generate(
    model: Model,
    params: Params,
    prompt_tokens: Any,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    key: jax.Array | None = None,
) -> np.ndarray:
    """Return the prompt continued by `max_new_tokens` sampled tokens, int32 ``[batch, prompt + new]``.

    Args:
        model: one that can decode; `params` may be sharded in any way.
        params: its parameters.
        prompt_tokens: ``[prompt]`` or ``[batch, prompt]`` token ids.
        max_new_tokens: tokens to add to every row.
        temperature: divides logits; 0 takes the likeliest token each time.
        top_k: sample among the k likeliest tokens only.
        key: decides the samples; `jax.random.key(0)` if not given.

    Raises `UserError` for a prompt or a setting that cannot work.

    >>> from meshwright.models import decoder, preset
    >>> model = decoder(preset("tiny", layers=1))
    >>> generate(model, model.init(jax.random.key(0)), [1, 2, 3], max_new_tokens=2).shape
    (1, 5)
    """
    prompt = np.atleast_2d(np.asarray(prompt_tokens))
    check_prompt(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
    total = prompt.shape[1] + max_new_tokens
    buffer = np.zeros((prompt.shape[0], total), np.int32)
    buffer[:, : prompt.shape[1]] = prompt
    run = _compiled(model, temperature == 0, top_k)
    key = jax.random.key(0) if key is None else key
    return np.asarray(run(params, buffer, np.int32(prompt.shape[1]), np.float32(temperature or 1.0), key))


@functools.lru_cache(maxsize=8)
def _compiled(model: Model, greedy: bool, top_k: int | None) -> Callable[..., jax.Array]:
    decode, empty_cache = model.decode, model.empty_cache
    assert decode is not None
    assert empty_cache is not None

    def run(
        params: Params, buffer: jax.Array, prompt: jax.Array, temperature: jax.Array, key: jax.Array
    ) -> jax.Array:
        batch, total = buffer.shape

        def add(index: jax.Array, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            buffer, cache = state
            current = jax.lax.dynamic_index_in_dim(buffer, index, axis=1, keepdims=False)
            logits, cache = decode(params, cache, current, index)
            given = jax.lax.dynamic_index_in_dim(buffer, index + 1, axis=1, keepdims=False)
            drawn = _draw(logits, temperature, greedy, top_k, jax.random.fold_in(key, index))
            following = jnp.where(index + 1 < prompt, given, drawn)
            return jax.lax.dynamic_update_index_in_dim(buffer, following, index + 1, axis=1), cache

        return jax.lax.fori_loop(0, total - 1, add, (buffer, empty_cache(batch, total)))[0]

    return jax.jit(run)


def _draw(
    logits: jax.Array, temperature: jax.Array, greedy: bool, top_k: int | None, key: jax.Array
) -> jax.Array:
    """Return one token for each row of logits ``[batch, vocab]``."""
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if top_k is not None:
        lowest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def check_prompt(
    model: Model,
    prompt: np.ndarray,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> None:
    """Raise what `generate` would for a prompt ``[batch, prompt]``, without the parameters."""
    if model.decode is None:
        raise UserError("this model has no decode function, so it cannot generate")
    vocab = model.config.vocab
    if prompt.ndim != 2 or prompt.shape[1] == 0 or not np.issubdtype(prompt.dtype, np.integer):
        raise UserError(
            "a prompt is whole numbers [prompt] or [batch, prompt], at least one; "
            f"got {prompt.dtype} {prompt.shape}"
        )
    if prompt.min() < 0 or prompt.max() >= vocab:
        wrong = int(prompt.max() if prompt.max() >= vocab else prompt.min())
        raise UserError(f"the prompt holds token {wrong}; the model's vocabulary is 0 to {vocab - 1}")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not temperature >= 0:
        raise UserError(f"temperature={temperature} must be at least 0 (0 takes the likeliest token)")
    if top_k is not None and not 1 <= top_k <= vocab:
        raise UserError(f"top_k={top_k} must be from 1 to the vocabulary's {vocab}")
    learned = model.config.position_embedding == "learned"
    if learned and prompt.shape[1] + max_new_tokens > (limit := model.config.max_sequence):
        raise UserError(
            f"prompt of {prompt.shape[1]} and max_new_tokens={max_new_tokens} exceed max_sequence={limit}; "
            f"at most {max(0, limit - prompt.shape[1])} can be added"
        )
