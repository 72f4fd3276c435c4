"""The smallest language model: each token predicts the next through one hidden layer. For tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from ..sharding.errors import UserError
from .model import Batch, Model, Params
from .transformer.loss import cross_entropy


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """Sizes of the perceptron; all at least 1."""

    vocab: int = 16
    embed: int = 8
    mlp: int = 32

    def __post_init__(self) -> None:
        """Refuse sizes below 1."""
        for name in ("vocab", "embed", "mlp"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")


def mlp(config: MlpConfig | None = None) -> Model:
    """Return the perceptron as a `Model`: the table, two matrices, float32 throughout.

    >>> mlp(MlpConfig(vocab=10, embed=4, mlp=6)).num_parameters
    124
    """
    config = config or MlpConfig()
    vocab, embed, hidden = config.vocab, config.embed, config.mlp

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 3)
        return {
            "table": jax.random.normal(keys[0], (vocab, embed)),
            "up": jax.random.normal(keys[1], (embed, hidden)) * embed**-0.5,
            "unembed": jax.random.normal(keys[2], (hidden, vocab)) * hidden**-0.5,
        }

    def stream(params: Params, tokens: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.einsum("bse,em->bsm", params["table"][tokens], params["up"]))

    def project(params: Params, x: jax.Array) -> jax.Array:
        return jnp.einsum("bsm,mv->bsv", x, params["unembed"])

    def logits(
        params: Params,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        del segment_ids, positions  # a token sees only itself
        return project(params, stream(params, tokens))

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        targets = batch["targets"]
        if (segment_ids := batch.get("segment_ids")) is not None:
            targets = jnp.where(segment_ids > 0, targets, -1)
        return cross_entropy(stream(params, batch["tokens"]), partial(project, params), targets, chunk=None)

    return Model(
        config=config,
        init=init,
        loss=loss,
        logits=logits,
        names={"table": ("vocab", "embed"), "up": ("embed", "mlp"), "unembed": ("mlp", "vocab")},
        num_parameters=vocab * embed + embed * hidden + hidden * vocab,
        flops_per_token=lambda sequence: 6.0 * (embed * hidden + hidden * vocab),
    )
