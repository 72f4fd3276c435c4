"""How much arithmetic a decoder's training step is, from its config alone."""

from __future__ import annotations

from .config import DecoderConfig


def matmul_parameters(config: DecoderConfig) -> int:
    """Return the scalars that a token is multiplied with: matrices but the look-up, of experts its own."""
    matrices = 2 if config.activation == "gelu" else 3
    dense = config.layers if config.experts is None else config.dense_layers or 0
    mlps = dense * matrices * config.embed * config.mlp
    if config.experts is not None:
        each = ((config.experts_per_token or 0) + (config.shared_experts or 0)) * (config.expert_mlp or 0)
        mlps += (config.layers - dense) * config.embed * (matrices * each + config.experts)
    return config.layers * _attention_parameters(config) + mlps + config.embed * config.vocab


def _attention_parameters(config: DecoderConfig) -> int:
    embed, heads = config.embed, config.heads
    if config.kv_rank is None:
        return 2 * embed * (heads + config.kv_heads) * config.head_dim
    turned, value = config.rope_head_dim or 0, config.value_head_dim or 0
    width = embed if config.query_rank is None else config.query_rank
    query = width * heads * (config.head_dim + turned) + (0 if width == embed else embed * width)
    latent = embed * (config.kv_rank + turned) + config.kv_rank * heads * (config.head_dim + value)
    return query + latent + heads * value * embed


def visible_keys(config: DecoderConfig, sequence: int) -> float:
    """Return the mean number of keys a query sees in one row that is one document, summed over layers.

    Half the sequence where attention is only causal; window · (1 - window / (2 · sequence)) inside a window.
    """
    window = min(config.window or sequence, sequence)
    local = window * (1.0 - window / (2.0 * sequence))
    global_layers = config.layers // config.global_every if config.global_every else 0
    return (config.layers - global_layers) * local + global_layers * sequence / 2.0


def flops_per_token(config: DecoderConfig, sequence: int) -> float:
    """Return floating-point operations of forward and backward per token, a multiply-add being two.

    Six for each matrix parameter (two forward, four backward; PaLM appendix B, arXiv:2204.02311) and
    6 · heads · (size of a query + size of a value) for each visible key. What remat computes again, norms and
    softmax are not counted.
    """
    query = config.head_dim + (config.rope_head_dim or 0)
    value = config.value_head_dim or config.head_dim
    attention = 6.0 * config.heads * (query + value) * visible_keys(config, sequence)
    return 6.0 * matmul_parameters(config) + attention
