"""Cross-entropy over a large vocabulary without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from ...sharding.errors import UserError, nearest_divisors

# Float32 logits (1/4 GiB) that a whole batch may have at once, and one row may have in a chunk.
_WHOLE_BATCH = 1 << 26
_ROW_CHUNK = 1 << 26


def logits_chunk(batch: int, sequence: int, vocab: int, chosen: int | None) -> int | None:
    """Return how many positions of each row to project at a time; None means all.

    The choice of the config if it made one. Otherwise everything at once while the whole batch has at most
    2^26 logits (256 MiB), and beyond that the largest divisor of the sequence at which one row has at most
    2^26 (at vocabulary 128,256 that is 512 positions), never more than half the sequence. Fewer and larger
    chunks matter because each chunk reads the whole output projection.

    Raises `UserError` when the chosen number does not divide a longer sequence.
    """
    if chosen is not None:
        if chosen < sequence and sequence % chosen:
            raise UserError(
                f"loss_chunk={chosen} does not divide sequence={sequence}; "
                f"nearest: {nearest_divisors(sequence, chosen)}"
            )
        return chosen if chosen < sequence else None
    if batch * sequence * vocab <= _WHOLE_BATCH:
        return None
    most = max(1, min(_ROW_CHUNK // vocab, sequence // 2))
    return next(chunk for chunk in range(most, 0, -1) if sequence % chunk == 0)


def cross_entropy(
    hidden: jax.Array,
    project: Callable[[jax.Array], jax.Array],
    targets: jax.Array,
    *,
    chunk: int | None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the mean loss over counted targets and its auxiliaries.

    Args:
        hidden: ``[batch, sequence, embed]``.
        project: from ``[batch, positions, embed]`` to float32 logits ``[batch, positions, vocab]``.
        targets: int32 ``[batch, sequence]``; negative ones are not counted.
        chunk: positions of each row to project at a time, a divisor of the sequence; None projects all.
            Logits are computed again in the backward pass when there is more than one chunk.
        z_loss: weight of the mean squared log-partition, which keeps logits from drifting (arXiv:2204.02311).

    Returns:
        The float32 scalar, in nats, and ``{"weight": counted targets, "accuracy": share predicted first}``.
    """

    def total(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _total(project(hidden), targets, z_loss)

    if chunk is None:
        loss, right = total(hidden, targets)
    else:
        batch, sequence = targets.shape
        chunks = sequence // chunk

        # Every n-th position: a sequence sharded in contiguous parts stays sharded inside each chunk.
        def split(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x.reshape(batch, chunk, chunks, *x.shape[2:]), 2, 0)

        @partial(jax.checkpoint, prevent_cse=False)
        def add(sums: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
            part = total(*xs)
            return (sums[0] + part[0], sums[1] + part[1]), None

        zero = jnp.zeros((), jnp.float32)
        (loss, right), _ = jax.lax.scan(add, (zero, zero), (split(hidden), split(targets)))
    weight = jnp.sum((targets >= 0).astype(jnp.float32))
    counted = jnp.maximum(weight, 1.0)
    return loss / counted, {"weight": weight, "accuracy": jax.lax.stop_gradient(right / counted)}


def _total(logits: jax.Array, targets: jax.Array, z_loss: float) -> tuple[jax.Array, jax.Array]:
    """Return the summed loss of counted targets, and how many of them have the highest logit."""
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    partition = jnp.log(jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1)) + highest
    # A comparison instead of a gather, which a sharded vocabulary would have to be collected for.
    vocab = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    chosen = jnp.sum(jnp.where(vocab == targets[..., None], logits, 0.0), axis=-1)
    loss = partition - chosen
    if z_loss:
        loss = loss + z_loss * partition * partition
    counted = targets >= 0
    right = counted & (chosen >= highest)
    return jnp.sum(jnp.where(counted, loss, 0.0)), jnp.sum(right.astype(jnp.float32))
