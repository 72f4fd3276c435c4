"""How much arithmetic a decoder's training step is, from its config alone."""

from __future__ import annotations

from .config import DecoderConfig


def matmul_parameters(config: DecoderConfig) -> int:
    """Return the scalars that a token is multiplied with: all matrices but the embedding look-up."""
    attention = 2 * config.embed * (config.heads + config.kv_heads) * config.head_dim
    mlp = (2 if config.activation == "gelu" else 3) * config.embed * config.mlp
    return config.layers * (attention + mlp) + config.embed * config.vocab


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
    12 · heads · head_dim for each visible key. What remat computes again, norms and softmax are not counted.
    """
    attention = 12.0 * config.heads * config.head_dim * visible_keys(config, sequence)
    return 6.0 * matmul_parameters(config) + attention
