"""A mixture of experts in place of a block's MLP: each token goes to the few experts that its router names.

No token is dropped: `sharding.ops.experts` takes as many rows as each expert gets. With a capacity every
shape is known: an expert takes so many tokens of a row, products are plain batched ones, and what is too many
is carried on by the residual stream (and the shared experts) alone. Tokens of different rows do not meet
either way, so that a batch in parts is the whole batch.
"""

from __future__ import annotations

import math
from typing import Literal

import jax

from ...sharding.ops.experts import ExpertsCall, experts, in_slots
from ..flax_nnx import nnx
from .config import DecoderConfig
from .layers import Mlp, added_gain, normal
from .router import Routing, choose, is_watched, routing, scores_of


def capacity(config: DecoderConfig, sequence: int) -> int | None:
    """Return how many tokens of a row an expert takes, its even share times `expert_capacity`; None: all."""
    if config.expert_capacity is None:
        return None
    even = sequence * (config.experts_per_token or 1) / (config.experts or 1)
    return min(sequence, max(1, math.ceil(even * config.expert_capacity)))


class Experts(nnx.Module):
    """Router, experts and, where the config has them, shared experts that every token goes to."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        count, embed, mlp = config.experts, config.embed, config.expert_mlp
        assert count is not None
        assert mlp is not None
        # Every token is scored by all experts where it is: what spreads them does not spread their scores.
        self.router = normal(rngs.params(), (embed, count), ("embed", "scores"), config, fan_in=embed)
        wide, narrow = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        if config.activation != "gelu":
            self.gate = normal(rngs.params(), (count, embed, mlp), wide, config, fan_in=embed)
        self.up = normal(rngs.params(), (count, embed, mlp), wide, config, fan_in=embed)
        gain = added_gain(config)
        self.down = normal(rngs.params(), (count, mlp, embed), narrow, config, fan_in=mlp, gain=gain)
        if config.shared_experts:
            self.shared = Mlp(config, rngs=rngs, hidden=config.shared_experts * mlp)

    def __call__(
        self, x: jax.Array, bias: jax.Array | None = None, segments: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        """Map ``[batch, sequence, embed]`` to the same; say how tokens were routed where that is asked for.

        `bias` ``[experts]`` is the router's, `segments` ``[batch, sequence]`` are 0 where no token is.
        """
        config = self.config
        scores = scores_of(config, x, self.router[...])
        weights, chosen = choose(config, scores, bias)
        gate = None if config.activation == "gelu" else self.gate[...].astype(x.dtype)
        up, down = self.up[...].astype(x.dtype), self.down[...].astype(x.dtype)
        act: Literal["silu", "gelu"] = "silu" if config.activation == "swiglu" else "gelu"
        slots, dropped = capacity(config, x.shape[1]), None
        if slots is None:
            out = experts(x, weights, chosen, up=up, down=down, gate=gate, activation=act)
        else:
            call = ExpertsCall(activation=act, gated=gate is not None)
            matrices = up, down, *(() if gate is None else (gate,))
            out, dropped = in_slots(call, x, weights, chosen, *matrices, slots=slots)
        found = None
        if is_watched(config):
            found = routing(scores, chosen, None if segments is None else segments > 0, dropped)
        return (out + self.shared(x) if config.shared_experts else out), found
