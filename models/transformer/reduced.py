"""A decoder of the same kind in small: as many options, few layers, narrow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from .config import DecoderConfig

# Returns a small size in place of the first, of about the second, that divides by what divides it.
Size = Callable[[int, int], int]

# Field → the size that it is brought down to.
_SIZES = {
    "embed": 64,
    "mlp": 64,
    "vocab": 128,
    "expert_mlp": 32,
    "kv_rank": 16,
    "query_rank": 16,
    "head_dim": 16,
    "rope_head_dim": 8,
    "value_head_dim": 16,
}
_EXPERTS, _TAKEN, _KV_HEADS = 8, 2, 4


def reduced(config: DecoderConfig, size: Size, *, layers: int, sequence: int, whole: int) -> DecoderConfig:
    """Return `config` with small sizes, for rows of `sequence` tokens in place of `whole` ones.

    Windows and chunks are as long a part of a row as they were, layers with and without experts or windows
    are there as they were.

    Args:
        config: of the whole model.
        size: what brings a size down.
        layers: of the stack that has most.
        sequence: tokens in a row.
        whole: tokens in a row of the whole model.
    """
    sizes = {
        name: size(value, least)
        for name, least in _SIZES.items()
        if (value := getattr(config, name)) is not None
    }
    kv_heads = size(config.kv_heads, _KV_HEADS) if config.kv_heads > 1 else 1
    heads = kv_heads * min(config.heads // config.kv_heads, 2 if kv_heads > 1 else _KV_HEADS)
    changed: dict[str, int | None] = {**sizes, "kv_heads": kv_heads, "heads": heads}
    for name in ("window", "attention_chunk", "loss_chunk"):
        if (value := getattr(config, name)) is not None:
            changed[name] = max(value * sequence // whole, 2 if name == "window" else 1)
    changed["max_sequence"] = max(size(config.max_sequence, sequence), sequence)
    changed["layers"] = layers
    if config.global_every is not None:
        changed["global_every"] = min(config.global_every, layers)
    if config.experts is not None:
        changed |= _experts(config, size, layers)
    return dataclasses.replace(config, **changed)


def _experts(config: DecoderConfig, size: Size, layers: int) -> dict[str, int | None]:
    """Return what has to do with experts, which are chosen from as many groups as can be."""
    assert config.experts is not None
    experts = size(config.experts, _EXPERTS)
    dense = None if config.dense_layers is None else min(config.dense_layers, _TAKEN)
    changed: dict[str, int | None] = {
        "experts": experts,
        "experts_per_token": min(config.experts_per_token or 1, _TAKEN),
        "dense_layers": dense,
        "layers": layers + (dense or 0),
    }
    if config.router_groups is not None:
        groups = min(config.router_groups, experts // 2)
        taken = min(config.router_groups_per_token or 1, max(groups // 2, 1))
        changed |= {"router_groups": groups, "router_groups_per_token": taken}
    return changed
