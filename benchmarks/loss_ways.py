"""Ways in which people write a loss over a vocabulary, as functions of small arrays (`recognition.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

ROWS, LENGTH, WIDTH, VOCABULARY = 4, 24, 16, 50

WAYS: dict[str, Callable[[Any, Any], Any]] = {}
# Left as they are written, with the reason that the note gives; without one there is nothing to tell: a loop
# has chosen its chunks, or no softmax makes a loss of it.
LEFT = {"vdot": "reshape", "in_a_loop": "", "sigmoid": ""}


def way(loss: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Add `loss` to `WAYS`."""
    WAYS[loss.__name__] = loss
    return loss


def arrays() -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Return parameters and a batch."""
    draw = np.random.default_rng(0)
    tables = {name: jnp.asarray(draw.normal(size=(WIDTH, VOCABULARY)), jnp.float32) for name in ("w", "w2")}
    params = {**tables, "b": jnp.ones(VOCABULARY), "cw": jnp.ones(VOCABULARY), "t": jnp.float32(0.7)}
    x = jnp.asarray(draw.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
    return params, {"x": x, "y": jnp.asarray(draw.integers(0, VOCABULARY, (ROWS, LENGTH)))}


def head(p: Any, b: Any) -> Any:
    """Return the logits."""
    return b["x"] @ p["w"]


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@way
def optax_int(p: Any, b: Any) -> Any:
    return cross_entropy(head(p, b), b["y"]).mean()


@way
def optax_onehot(p: Any, b: Any) -> Any:
    return optax.softmax_cross_entropy(head(p, b), jax.nn.one_hot(b["y"], VOCABULARY)).mean()


@way
def vmapped(p: Any, b: Any) -> Any:
    lp = jax.nn.log_softmax(head(p, b))
    return -jax.vmap(jax.vmap(lambda logits, y: logits[y]))(lp, b["y"]).mean()


@way
def vmapped_logits(p: Any, b: Any) -> Any:
    logits = head(p, b)
    return (jax.nn.logsumexp(logits, -1) - jax.vmap(jax.vmap(lambda row, y: row[y]))(logits, b["y"])).mean()


@way
def vmapped_flat(p: Any, b: Any) -> Any:
    logits = head(p, b).reshape(-1, VOCABULARY)
    y = b["y"].reshape(-1)
    return -jax.vmap(lambda logits, y: jax.nn.log_softmax(logits)[y])(logits, y).mean()


@way
def indexed_flat(p: Any, b: Any) -> Any:
    logits = jax.nn.log_softmax(head(p, b).reshape(-1, VOCABULARY))
    y = b["y"].reshape(-1)
    return -logits[jnp.arange(logits.shape[0]), y].mean()


@way
def indexed_2d(p: Any, b: Any) -> Any:
    logits = jax.nn.log_softmax(head(p, b))
    y = b["y"]
    return -logits[jnp.arange(ROWS)[:, None], jnp.arange(LENGTH)[None], y].mean()


@way
def along(p: Any, b: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(head(p, b)), b["y"][..., None], -1).mean()


@way
def onehot_einsum(p: Any, b: Any) -> Any:
    return -jnp.einsum("bsv,bsv->", jax.nn.one_hot(b["y"], VOCABULARY), jax.nn.log_softmax(head(p, b))) / (
        ROWS * LENGTH
    )


@way
def onehot_einsum_rows(p: Any, b: Any) -> Any:
    return -jnp.einsum(
        "bsv,bsv->bs", jax.nn.one_hot(b["y"], VOCABULARY), jax.nn.log_softmax(head(p, b))
    ).mean()


@way
def smoothing(p: Any, b: Any) -> Any:
    t = jax.nn.one_hot(b["y"], VOCABULARY) * 0.9 + 0.1 / VOCABULARY
    return -(t * jax.nn.log_softmax(head(p, b))).sum(-1).mean()


@way
def smoothing_optax(p: Any, b: Any) -> Any:
    t = optax.smooth_labels(jax.nn.one_hot(b["y"], VOCABULARY), 0.1)
    return optax.softmax_cross_entropy(head(p, b), t).mean()


@way
def smoothing_mean(p: Any, b: Any) -> Any:
    lp = jax.nn.log_softmax(head(p, b))
    n = -jnp.take_along_axis(lp, b["y"][..., None], -1)[..., 0]
    return (0.9 * n - 0.1 * lp.mean(-1)).mean()


@way
def zloss(p: Any, b: Any) -> Any:
    logits = head(p, b)
    z = jax.nn.logsumexp(logits, -1)
    ll = jnp.take_along_axis(logits, b["y"][..., None], -1)[..., 0]
    return (z - ll).mean() + 1e-4 * (z**2).mean()


@way
def softcap(p: Any, b: Any) -> Any:
    logits = 30 * jnp.tanh(head(p, b) / 30)
    return cross_entropy(logits, b["y"]).mean()


@way
def masked(p: Any, b: Any) -> Any:
    n = cross_entropy(head(p, b), b["y"])
    m = b["y"] > 3
    return (n * m).sum() / m.sum()


@way
def masked_where(p: Any, b: Any) -> Any:
    n = cross_entropy(head(p, b), b["y"])
    m = b["y"] > 3
    return jnp.where(m, n, 0).sum() / m.sum()


@way
def mean_where(p: Any, b: Any) -> Any:
    n = cross_entropy(head(p, b), b["y"])
    return n.mean(where=b["y"] > 3)


@way
def shifted(p: Any, b: Any) -> Any:
    logits = head(p, b)[:, :-1]
    return cross_entropy(logits, b["y"][:, 1:]).mean()


@way
def bias(p: Any, b: Any) -> Any:
    return cross_entropy(head(p, b) + p["b"], b["y"]).mean()


@way
def accuracy(p: Any, b: Any) -> Any:
    logits = head(p, b)
    n = cross_entropy(logits, b["y"]).mean()
    return n + 0 * (logits.argmax(-1) == b["y"]).mean()


@way
def whole_sum(p: Any, b: Any) -> Any:
    return -jnp.sum(jax.nn.log_softmax(head(p, b)) * jax.nn.one_hot(b["y"], VOCABULARY)) / (ROWS * LENGTH)


@way
def whole_sum_masked(p: Any, b: Any) -> Any:
    return -jnp.sum(
        jax.nn.log_softmax(head(p, b)) * jax.nn.one_hot(b["y"], VOCABULARY) * (b["y"] > 3)[..., None]
    ) / (ROWS * LENGTH)


@way
def vdot(p: Any, b: Any) -> Any:
    return -jnp.vdot(jax.nn.log_softmax(head(p, b)), jax.nn.one_hot(b["y"], VOCABULARY)) / (ROWS * LENGTH)


@way
def probs_log(p: Any, b: Any) -> Any:
    return -jnp.log(jnp.take_along_axis(jax.nn.softmax(head(p, b)), b["y"][..., None], -1) + 1e-9).mean()


@way
def sigmoid(p: Any, b: Any) -> Any:
    return optax.sigmoid_binary_cross_entropy(head(p, b), jax.nn.one_hot(b["y"], VOCABULARY)).sum(-1).mean()


@way
def in_a_loop(p: Any, b: Any) -> Any:
    return jax.lax.map(lambda xy: cross_entropy(xy[0] @ p["w"], xy[1]).mean(), (b["x"], b["y"])).mean()


@way
def vmap_rows(p: Any, b: Any) -> Any:
    return jax.vmap(lambda x, y: cross_entropy(x @ p["w"], y).mean())(b["x"], b["y"]).mean()


@way
def vmap_tokens(p: Any, b: Any) -> Any:
    return jax.vmap(jax.vmap(lambda x, y: -jax.nn.log_softmax(x @ p["w"])[y]))(b["x"], b["y"]).mean()


@way
def half_precision(p: Any, b: Any) -> Any:
    return cross_entropy(
        (b["x"].astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32), b["y"]
    ).mean()


@way
def label_mask_ignore(p: Any, b: Any) -> Any:
    y = b["y"]
    m = y != 3
    ll = jnp.take_along_axis(jax.nn.log_softmax(head(p, b)), jnp.where(m, y, 0)[..., None], -1)[..., 0]
    return -(ll * m).sum() / jnp.maximum(m.sum(), 1)


@way
def kl(p: Any, b: Any) -> Any:
    lp = jax.nn.log_softmax(head(p, b))
    t = jax.nn.softmax(b["x"] @ p["w2"])
    return (t * (jnp.log(t) - lp)).sum(-1).mean()


@way
def focal(p: Any, b: Any) -> Any:
    lp = jnp.take_along_axis(jax.nn.log_softmax(head(p, b)), b["y"][..., None], -1)[..., 0]
    return -((1 - jnp.exp(lp)) ** 2 * lp).mean()


@way
def einsum_table(p: Any, b: Any) -> Any:
    return cross_entropy(jnp.einsum("bse,ve->bsv", b["x"], p["w"].T), b["y"]).mean()


@way
def flat_first(p: Any, b: Any) -> Any:
    return cross_entropy(b["x"].reshape(-1, WIDTH) @ p["w"], b["y"].reshape(-1)).mean()


@way
def perplexity_aux(p: Any, b: Any) -> Any:
    logits = head(p, b)
    n = cross_entropy(logits, b["y"])
    e = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1).mean()
    return n.mean() - 0.01 * e


@way
def class_weights(p: Any, b: Any) -> Any:
    n = cross_entropy(head(p, b), b["y"])
    w = p["cw"][b["y"]]
    return (n * w).sum() / w.sum()


@way
def flax_like(p: Any, b: Any) -> Any:
    logits = head(p, b)
    logits = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    return (jnp.log(jnp.exp(logits).sum(-1)) - (logits * jax.nn.one_hot(b["y"], VOCABULARY)).sum(-1)).mean()


@way
def temperature(p: Any, b: Any) -> Any:
    return cross_entropy(head(p, b) / p["t"], b["y"]).mean()


@way
def two_heads(p: Any, b: Any) -> Any:
    return cross_entropy(head(p, b), b["y"]).mean() + cross_entropy(b["x"] @ p["w2"], b["y"]).mean()
