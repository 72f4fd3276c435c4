"""Masks of packed segments in the ways that people write them, alone and beside padding.

Arrays are those of `attention_ways`. Segments may come back after others, and keys of a segment be padding
though its queries are not, so that who sees a key at all is told by the data.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from attention_ways import Way, adding, causal, columns, documents, hiding, kept, rows


def asked(x: dict[str, jax.Array]) -> jax.Array:
    """Return which queries are no padding."""
    return x["keep"][:, None, :, None]


def others(x: dict[str, jax.Array]) -> jax.Array:
    """Return which keys, of an array of their own, are of the query's segment."""
    return x["segment"][:, None, :, None] == (x["segment"][:, ::-1] // 2)[:, None, None, :]


def near(x: dict[str, jax.Array]) -> jax.Array:
    """Return which keys are at most five places before a query."""
    return rows(x) - columns(x) < 6


# Tests look for "padd" in a name: there sequences are padded in front, or wholly, too.
WAYS: dict[str, Way] = {
    "segments": hiding(documents),
    "causal segments": hiding(lambda x: causal(x) & documents(x)),
    "causal segments, added": adding(lambda x: jnp.where(causal(x) & documents(x), 0.0, -1e30)),
    "segments in a window": hiding(lambda x: causal(x) & documents(x) & near(x)),
    "padding told by segments": hiding(
        lambda x: documents(x) & (x["segment"] > 0)[:, None, None, :] & causal(x)
    ),
    "segments, keys padded": hiding(lambda x: documents(x) & kept(x)),
    "causal segments, keys padded": hiding(lambda x: causal(x) * kept(x) & documents(x)),
    "segments in a window, keys padded": hiding(lambda x: causal(x) & documents(x) & near(x) & kept(x)),
    "segments ahead, keys padded": hiding(
        lambda x: (columns(x) - rows(x) < 3) & documents(x) & near(x) & kept(x)
    ),
    "causal segments, keys padded, added": adding(
        lambda x: jnp.where(causal(x) & documents(x) & kept(x), 0.0, -1e30)
    ),
    "segments, queries padded": hiding(lambda x: documents(x) & asked(x)),
    "segments of other keys, padded": hiding(lambda x: others(x) & asked(x) & kept(x)),
    "segments of other keys, not padded": hiding(others),
}
