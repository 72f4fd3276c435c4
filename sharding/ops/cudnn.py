"""cuDNN's attention: its calls with masks by chunks of queries and with packed segments, and GPUs not here.

`jax.nn.dot_product_attention` takes segments as a mask of all queries and keys, writes the mask's gradient in
JAX 0.10, and its packed layout counts grouped heads wrongly there. So the primitives under it are bound with
operands of our own, which take no part in partitioning: under `jax.shard_map`, a device's own rows.

XLA compiles calls of cuDNN without it, and leaves them in the program. JAX wants more: it asks the library
for its version when it traces a call, and devices when it lowers one, to partition what `jax.shard_map` has
partitioned already.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import dispatch  # seen in 0.10.2 and 0.12.0
from jax._src.cudnn import fused_attention_stablehlo
from jax.ad_checkpoint import checkpoint_name

from .segments import by_run, by_token, packed_offsets

# What a call becomes: plain, with a mask, and their gradients.
CUSTOM_CALLS = (
    "__cudnn$fmhaSoftmax",
    "__cudnn$fmhaSoftmaxBackward",
    "__cudnn$fmhaScaleBiasSoftmax",
    "__cudnn$fmhaScaleBiasSoftmaxBackward",
)

_PRIMITIVES = ("dot_product_attention", "custom_partitioning")

# cuDNN 9.12, the oldest that the CUDA 13 wheels of these versions of JAX take.
_OLDEST = 91200

# Queries of a row that share a mask: an eighth of the row, within these; fewer make more, smaller kernels.
_CHUNKS, _LEAST_CHUNK, _MOST_CHUNK = 8, 256, 2048
# Where a chunk's keys may begin: whole tiles of cuDNN's kernels.
_TILE = 128


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What of one call of cuDNN is no array."""

    scale: float
    causal: bool
    window: int | None = None
    most: int | None = None
    name: str | None = None


def masked(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_ids: jax.Array,
    key_ids: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    name: str | None = None,
) -> jax.Array:
    """Return attention within segments, ``[batch, queries, heads, value_dim]``, by masks of few queries.

    The mask of a chunk of queries is ``[batch, 1, chunk, keys]``, made anew for the gradient; keys that
    causality or a window hides from all of a chunk are not read.
    """
    return _masked(query, key, value, query_ids, key_ids, _Asked(scale, causal, window, name=name))


def packed(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ids: jax.Array,
    *,
    most: int,
    scale: float,
    causal: bool,
    name: str | None = None,
) -> jax.Array:
    """Return attention within runs of `ids`, of which a row has at most `most`, by cuDNN's packed layout.

    Of softmax's sums, float32 ``[batch · most, heads, sequence]``, those of tokens are kept for the gradient,
    ``[batch, sequence, heads]``. Values may be narrower than queries; one offset serves keys and values, so
    they are padded to the queries' width.
    """
    width = value.shape[3]
    wide = jnp.pad(value, ((0, 0),) * 3 + ((0, query.shape[3] - width),))
    out: Any = _packed(query, key, wide, ids, _Asked(scale, causal, most=most, name=name))
    return out[..., :width]


def plain(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    name: str | None = None,
) -> jax.Array:
    """Return attention without segments; values may be of another width than queries."""
    out: Any = _plain(query, key, value, _Asked(scale, causal, window, name=name))
    return out


def with_sums(
    query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """Return attention of scaled queries, and its sums' logarithms, float32 ``[batch, heads, queries]``."""
    out, sums = _forward((query, key, value), _Asked(1.0, causal), training=True)
    return out, sums


def gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    out: jax.Array,
    sums: jax.Array,
    d_out: jax.Array,
    causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of queries, keys and values by a result and sums that may be of more keys."""
    d_query, d_key, d_value = _backward((query, key, value), _Asked(1.0, causal), sums, out, d_out)
    return d_query, d_key, d_value


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _plain(query: Any, key: Any, value: Any, call: _Asked) -> jax.Array:
    return _forward((query, key, value), call, training=False)[0]


def _plain_forward(query: Any, key: Any, value: Any, call: _Asked) -> tuple[jax.Array, Any]:
    out, sums = _kept(_forward((query, key, value), call, training=True), call)
    return out, (query, key, value, out, sums)


def _plain_backward(call: _Asked, kept: Any, d: jax.Array) -> tuple[Any, ...]:
    query, key, value, out, sums = kept
    return (*_backward((query, key, value), call, sums, out, d),)


_plain.defvjp(_plain_forward, _plain_backward)


def _kept(values: Any, call: _Asked) -> Any:
    """Return what a gradient reads, under the name by which rematerialisation keeps it, if there is one."""
    return values if call.name is None else jax.tree.map(lambda one: checkpoint_name(one, call.name), values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _masked(query: Any, key: Any, value: Any, query_ids: Any, key_ids: Any, call: _Asked) -> jax.Array:
    outs, done = [], query
    for rows, keys in _chunks(query.shape[1], key.shape[1], call):
        bias = _bias(done, query_ids, key_ids, rows, keys, call)
        done = _forward((query[:, rows], key[:, keys], value[:, keys]), call, bias=bias, training=False)[0]
        outs.append(done)
    return jnp.concatenate(outs, axis=1)


def _masked_forward(
    query: Any, key: Any, value: Any, query_ids: Any, key_ids: Any, call: _Asked
) -> tuple[jax.Array, Any]:
    outs, sums, done = [], [], query
    for rows, keys in _chunks(query.shape[1], key.shape[1], call):
        bias = _bias(done, query_ids, key_ids, rows, keys, call)
        done, total = _forward((query[:, rows], key[:, keys], value[:, keys]), call, bias=bias, training=True)
        outs.append(done)
        sums.append(total)
    out, sums = _kept((jnp.concatenate(outs, axis=1), sums), call)
    return out, (query, key, value, query_ids, key_ids, out, sums)


def _masked_backward(call: _Asked, kept: Any, d: jax.Array) -> tuple[Any, ...]:
    query, key, value, query_ids, key_ids, out, sums = kept
    of_queries, done = [], d
    # Chunks add to the gradients of keys and values; in float32, so that each is rounded once.
    of_key, of_value = (jnp.zeros(array.shape, jnp.float32) for array in (key, value))
    for (rows, keys), total in zip(_chunks(query.shape[1], key.shape[1], call), sums, strict=True):
        bias = _bias(done, query_ids, key_ids, rows, keys, call)
        arrays = query[:, rows], key[:, keys], value[:, keys]
        done, dk, dv = _backward(arrays, call, total, out[:, rows], d[:, rows], bias=bias)
        of_queries.append(done)
        of_key, of_value = (_added(total, keys, part) for total, part in ((of_key, dk), (of_value, dv)))
    gradients = of_key.astype(key.dtype), of_value.astype(value.dtype)
    return jnp.concatenate(of_queries, axis=1), *gradients, None, None


_masked.defvjp(_masked_forward, _masked_backward)


def _added(total: jax.Array, keys: slice, part: jax.Array) -> jax.Array:
    """Return `total` with `part` added to it at `keys`; JAX would write an addition to all as a scatter."""
    part = part.astype(total.dtype)
    return total + part if part.shape == total.shape else total.at[:, keys].add(part)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _packed(query: Any, key: Any, value: Any, ids: Any, call: _Asked) -> jax.Array:
    return _forward((query, key, value), call, ids=ids, training=False)[0]


def _packed_forward(query: Any, key: Any, value: Any, ids: Any, call: _Asked) -> tuple[jax.Array, Any]:
    out, sums = _forward((query, key, value), call, ids=ids, training=True)
    # cuDNN gives each of the runs that there may be a whole row of sums: kept are those of tokens.
    out, sums = _kept((out, by_token(sums, ids)), call)
    return out, (query, key, value, ids, out, sums)


def _packed_backward(call: _Asked, kept: Any, d: jax.Array) -> tuple[Any, ...]:
    query, key, value, ids, out, sums = kept
    assert call.most is not None
    sums = by_run(sums, ids, call.most)
    return *_backward((query, key, value), call, sums, out, d, ids=ids), None


_packed.defvjp(_packed_forward, _packed_backward)


def sliced(queries: int, keys: int, *, causal: bool, window: int | None) -> float:
    """Return how often keys and values lie in memory besides, as chunks of queries with masks read them.

    >>> sliced(4096, 4096, causal=True, window=None)  # of eight chunks all but the last read a part
    3.5
    """
    parts = [one for _, one in _chunks(queries, keys, _Asked(1.0, causal, window))]
    return sum(one.stop - one.start for one in parts if one.stop - one.start < keys) / keys


def _chunks(queries: int, keys: int, call: _Asked) -> list[tuple[slice, slice]]:
    """Return the queries of each chunk, and the keys that any of them sees."""
    most = min(max(queries // _CHUNKS, _LEAST_CHUNK), _MOST_CHUNK)
    chunk = next((size for size in range(most, 0, -1) if queries % size == 0 and size % 2 == 0), queries)
    chunk = chunk if 2 * chunk > most else queries
    parts = []
    for start in range(0, queries, chunk):
        low = 0 if call.window is None else max(0, start - call.window + 1) // _TILE * _TILE
        high = min(start + chunk, keys) if call.causal else keys
        parts.append((slice(start, start + chunk), slice(low, high)))
    return parts


def _bias(
    done: jax.Array, query_ids: jax.Array, key_ids: jax.Array, rows: slice, keys: slice, call: _Asked
) -> jax.Array:
    """Return zero where a query of the chunk sees a key, a large negative number elsewhere; type of `done`.

    The masks of all chunks together are of the sequence squared. By itself XLA makes them before the first
    kernel, those of a forward pass before the first layer, and holds them until the last; so too the zeros
    and large numbers that masks are chosen from. Therefore a mask reads a number of what is `done` before it.
    """
    hidden = fused_attention_stablehlo.get_large_negative_number(done.dtype)
    none, zero = jnp.zeros((), done.dtype), jnp.zeros((), query_ids.dtype)
    last, none, hidden, zero = jax.lax.optimization_barrier((done.reshape(-1)[0], none, hidden, zero))
    # Zero whatever that number is, as XLA cannot know before it has passed the barrier.
    last = (last > 0).astype(zero.dtype) & zero
    query_ids, key_ids = query_ids[:, rows] + last, key_ids[:, keys]
    seen = query_ids[:, :, None] == key_ids[:, None]
    if call.causal:
        distance = jnp.arange(rows.start, rows.stop)[:, None] - jnp.arange(keys.start, keys.stop)
        seen &= distance >= 0
        if call.window is not None:
            seen &= distance < call.window
    return jnp.where(seen, none, hidden)[:, None]


def _settings(call: _Asked, *, packs: bool, biased: bool) -> dict[str, Any]:
    """Return what both primitives are bound with. A mask hides all that causality does."""
    kinds = fused_attention_stablehlo.MaskType
    kind = kinds.PADDING_CAUSAL if call.causal else kinds.PADDING
    unmasked = kinds.CAUSAL if call.causal and not biased else kinds.NO_MASK
    settings: dict[str, Any] = {
        "scale": call.scale,
        "seed": 42,
        "dropout_rate": 0.0,
        # Whether there is a mask, and whether its gradient is asked for.
        "variadic_args": (biased, False),
        "mask_type": kind if packs else unmasked,
        "layout": fused_attention_stablehlo.AttentionLayout.BTNH.value,
        "sliding_window_length": None if packs or biased else call.window,
    }
    if "score_mod" in inspect.signature(fused_attention_stablehlo._dot_product_attention_fwd_impl).parameters:
        settings |= {"score_mod_name": None, "score_mod_jaxpr": None}
    return settings


def _operands(arrays: tuple[Any, Any, Any], call: _Asked, ids: Any, bias: Any) -> tuple[Any, ...]:
    """Return what both primitives take first: arrays, mask, lengths, offsets, and no pages."""
    query, key, value = arrays
    none = jnp.zeros(0, query.dtype)
    if ids is None:
        return query, key, value, none if bias is None else bias, none, none, none, none, none, none
    assert call.most is not None
    # A device's keys may have fewer heads than its queries, so that they have offsets of their own.
    of_queries, lengths = packed_offsets(ids, call.most, query.shape[2] * query.shape[3])
    of_keys, _ = packed_offsets(ids, call.most, key.shape[2] * key.shape[3])
    return query, key, value, none, lengths, lengths, of_queries, of_keys, none, none


def _forward(
    arrays: tuple[Any, Any, Any], call: _Asked, *, training: bool, ids: Any = None, bias: Any = None
) -> Any:
    """Return the result and, if `training`, the sums of its softmax."""
    fused_attention_stablehlo.check_is_flash_attention(
        *arrays,
        fused_attention_stablehlo.AttentionLayout.BTNH.value,
        fused_attention_stablehlo.check_cudnn_version(),
        bias is not None,
        training,
        ids is not None,
    )
    settings = _settings(call, packs=ids is not None, biased=bias is not None)
    bind = fused_attention_stablehlo._dot_product_attention_fwd_p.bind
    return bind(*_operands(arrays, call, ids, bias), is_training=training, **settings)


def _backward(
    arrays: tuple[Any, Any, Any],
    call: _Asked,
    sums: Any,
    out: Any,
    d: Any,
    *,
    ids: Any = None,
    bias: Any = None,
) -> Any:
    """Return the gradients of queries, keys and values."""
    settings = _settings(call, packs=ids is not None, biased=bias is not None)
    bind = fused_attention_stablehlo._dot_product_attention_bwd_p.bind
    return bind(*_operands(arrays, call, ids, bias), sums, out, d, **settings)


def library_version() -> int | None:
    """Return the version of cuDNN that JAX runs with, such as 91200; None where there is none."""
    try:
        return int(fused_attention_stablehlo.check_cudnn_version())
    except RuntimeError:
        return None


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Within it JAX traces cuDNN's attention where the library is not there, for the oldest that it takes."""
    asked = fused_attention_stablehlo.check_cudnn_version

    def version() -> int:
        try:
            return asked()
        except RuntimeError:
            return _OLDEST

    fused_attention_stablehlo.check_cudnn_version = version
    try:
        yield
    finally:
        fused_attention_stablehlo.check_cudnn_version = asked


@contextlib.contextmanager
def described() -> Iterator[None]:
    """Within it JAX traces and lowers cuDNN's attention for a GPU that is not here, under `jax.shard_map`.

    What such a GPU can do is in ``kernels.toml``: JAX, which would ask the one that is here, asks nothing.
    """
    asked = fused_attention_stablehlo.check_cudnn_version
    asked_chip = fused_attention_stablehlo.check_compute_capability
    needing = dispatch.prim_requires_devices_during_lowering
    spared = {one for one in needing if one.name.startswith(_PRIMITIVES)}
    fused_attention_stablehlo.check_cudnn_version = lambda: _OLDEST
    fused_attention_stablehlo.check_compute_capability = lambda _: True
    needing -= spared
    try:
        yield
    finally:
        fused_attention_stablehlo.check_cudnn_version = asked
        fused_attention_stablehlo.check_compute_capability = asked_chip
        needing |= spared
