"""Attention that `jax.nn.dot_product_attention` hands to cuDNN, and calls of `ops.attention` with a bias."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ...ops.attention import attention_call
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
    queries, length = shape(query)[1], shape(key)[1]
    if "PADDING" in kind and (values.number(rows), values.number(keys)) != (queries, length):
        raise NotThis("it tells cuDNN lengths")
    biases = _biases(bias) if asked["variadic_args"][0] else []
    spans = _spans(queries, length, kind, asked["sliding_window_length"])
    return _written(eqn, scope, masks, (query, key, value), biases, spans, scale=asked["scale"])


def by_call(eqn: core.JaxprEqn, scope: Opened, masks: Masks) -> WrittenAttention | None:
    """Return the attention of a call of `ops.attention` with a bias, None if it is anything else.

    Of one that weighs keys by nothing besides, so that it is the same call but for what its bias is made of.
    """
    call = attention_call(eqn)
    if call is None or call.given != ("bias",) or call.windowed or call.segments > 1 or call.fill is not None:
        return None
    query, key, value, *ids, bias = eqn.invars
    place, last = np.arange(shape(query)[1])[:, None], shape(key)[1] - 1
    low, high = np.zeros(len(place), np.int64), np.full(len(place), last, np.int64)
    if call.causal:
        high = np.minimum(np.maximum(place[:, 0] + call.ahead, call.prefix - 1), last)
        low = low if call.window is None else np.maximum(place[:, 0] - call.window + 1, 0)
    found = _written(
        eqn,
        scope,
        masks,
        (query, key, value),
        _biases(bias),
        Spans(low, high),
        scale=call.scale / (call.cap or 1.0),
        cap=call.cap,
        precision=call.precision,
    )
    for one in ids:
        asking, own = (
            masks.stripped(Part(atom=one, labels=((_BATCH,), (along,)), how="added", fill=0.0), found.sizes)
            for along in (_ROWS, _KEYS)
        )
        for mask in (found.mask, found.written):
            mask.segments.append((asking, own))
    return found


def _written(
    eqn: core.JaxprEqn,
    scope: Opened,
    masks: Masks,
    arrays: tuple[Any, Any, Any],
    biases: list[Part],
    spans: Spans,
    **asked: Any,
) -> WrittenAttention:
    """Return attention of `arrays`, all ``[batch, sequence, heads, width]``, that sees `spans`."""
    query, key, value = arrays
    (batch, queries, heads, _), (_, length, kv_heads, _) = shape(query), shape(key)
    sizes = (batch, kv_heads, heads // kv_heads, queries, length, shape(value)[3])
    scores = Scores(sizes=sizes[:5], batch=(_BATCH, _HEADS), rows=_ROWS, keys=_KEYS)
    mask = masks.read(biases, scores)
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
        mask=mask,
        written=dataclasses.replace(masks.read(biases, scores, apart=False), seen=spans),
        scores_aval=jax.ShapeDtypeStruct(sizes[:5], jnp.float32),
        **{"cap": None, **asked},
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
