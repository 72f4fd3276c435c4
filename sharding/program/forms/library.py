"""Attention that `jax.nn.dot_product_attention` hands to cuDNN, be that there or not."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ..jaxpr import call_body
from .attention import WrittenAttention
from .masks import Labels, Masks, Part, Scores
from .opened import Opened
from .spans import NotThis, Spans
from .values import Sources, shape

# JAX's own names of the call and of what it runs.
_CALL, _KERNEL = "_dot_product_attention", "dot_product_attention_fwd_wrapper"

# Labels of the scores, and of the width of values.
_BATCH, _HEADS, _GROUP, _ROWS, _KEYS, _WIDTH = range(6)


def by_cudnn(eqn: core.JaxprEqn, scope: Opened, values: Sources, masks: Masks) -> WrittenAttention | None:
    """Return the attention that `eqn` asks cuDNN for, None if it is anything else.

    Raises NotThis if it asks for what cannot be had elsewhere.
    """
    if eqn.primitive.name != "custom_vjp_call" or (body := call_body(eqn)) is None:
        return None
    kernels = [one for one in body.eqns if one.primitive.name == _KERNEL]
    if len(body.eqns) != 1 or not kernels:
        return None
    asked = kernels[0].params
    place = dict(zip(body.jaxpr.invars, eqn.invars, strict=True))
    query, key, value, bias, rows, keys = (place[atom] for atom in kernels[0].invars[:6])
    kind = asked["mask_type"].name
    if asked["layout"] or asked["dropout_rate"] or asked.get("score_mod") is not None:
        raise NotThis("it asks cuDNN for dropout, or another order of dimensions")
    (batch, queries, heads, _), (_, length, kv_heads, _) = shape(query), shape(key)
    if "PADDING" in kind and (values.number(rows), values.number(keys)) != (queries, length):
        raise NotThis("it tells cuDNN lengths")
    sizes = (batch, kv_heads, heads // kv_heads, queries, length, shape(value)[3])
    scores = Scores(sizes=sizes[:5], batch=(_BATCH, _HEADS), rows=_ROWS, keys=_KEYS)
    biases = _biases(bias) if asked["variadic_args"][0] else []
    mask = masks.read(biases, scores)
    spans = _spans(queries, length, kind, asked["sliding_window_length"])
    mask.seen = mask.seen.within(spans)
    return WrittenAttention(
        product=eqn,
        scope=scope,
        query=query,
        key=key,
        value=value,
        place={
            "query": ((_BATCH,), (_ROWS,), (_HEADS, _GROUP), (-1,)),
            "key": ((_BATCH,), (_KEYS,), (_HEADS,), (-1,)),
            "value": ((_BATCH,), (_KEYS,), (_HEADS,), (_WIDTH,)),
            "out": ((_BATCH,), (_ROWS,), (_HEADS, _GROUP), (_WIDTH,)),
        },
        scores=scores,
        groups=(_GROUP,),
        sizes=sizes,
        scale=asked["scale"],
        cap=None,
        mask=mask,
        written=dataclasses.replace(masks.read(biases, scores, apart=False), seen=spans),
        scores_aval=jax.ShapeDtypeStruct(sizes[:5], jnp.float32),
    )


def _biases(bias: Any) -> list[Part]:
    """Return what is added to scores, an array ``[batch, heads, queries, keys]`` with sizes of 1."""
    labels = ((_BATCH,), (_HEADS, _GROUP), (_ROWS,), (_KEYS,))
    found: Labels = tuple(() if size == 1 else one for size, one in zip(shape(bias), labels, strict=True))
    return [Part(atom=bias, labels=found, how="added", fill=1.0, added=1)]


def _spans(queries: int, keys: int, kind: str, window: int | None) -> Spans:
    rows = np.arange(queries)
    if "CAUSAL" not in kind:
        return Spans(np.zeros(queries, np.int64), np.full(queries, keys - 1, np.int64))
    low = np.maximum(rows - window + 1, 0) if window and window > 0 else np.zeros(queries, np.int64)
    return Spans(low, np.minimum(rows, keys - 1))
