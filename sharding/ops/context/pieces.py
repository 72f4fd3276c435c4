"""Kernels of the chip for a piece of attention, which give its softmax's sums and take those of all pieces.

The libraries' own gradients know one piece only, so their backward kernels are called by private names, with
the logarithm of the sum over all keys: `_splash_attention_bwd` as seen in JAX 0.10.2 and 0.12.0.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import cudnn
from ..attention import AttentionCall
from ..kernels import pair_of_blocks, splash_kernel

SPLASH, CUDNN = "splash", "cudnn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PieceKernel:
    """A kernel of pieces: its name, for splash the largest blocks, and whether a CPU interprets it.

    `asked` says that a plan asks cuDNN for a ring's pieces, which no card has compared with XLA's yet.
    """

    name: str
    asked: bool = False
    block_q: int = 0
    block_kv: int = 0
    interpret: bool = False


class ChunkPiece(NamedTuple):
    """Queries, keys and values ``[batch, rows, heads, dim]`` of a piece, and both's segment ids or None."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    query_ids: jax.Array | None = None
    key_ids: jax.Array | None = None


def takes_pieces(kernel: PieceKernel, call: AttentionCall, rows: int, key_rows: int) -> bool:
    """Return whether `kernel` can work through pieces of so many queries and keys."""
    if call.windowed or call.window is not None or call.ahead or call.prefix:
        return False
    if kernel.name == SPLASH:
        return pair_of_blocks(rows, key_rows, (kernel.block_q, kernel.block_kv)) is not None
    # cuDNN would read segments as a mask of all queries and keys.
    return kernel.name == CUDNN and kernel.asked and not call.segments


def piece_forward(
    kernel: PieceKernel, call: AttentionCall, piece: ChunkPiece, *, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """Return a piece's result, and the logarithm of each row's sum, float32 ``[batch, heads, rows]``.

    Queries are scaled already; `causal` says whether a query sees no key after its own place in the piece.
    """
    call = dataclasses.replace(call, causal=causal)
    # What is compiled says of each piece what it computes: most pieces of a causal call have all pairs.
    with jax.named_scope(call.name):
        if kernel.name == CUDNN:
            return cudnn.with_sums(piece.query, piece.key, piece.value, causal=causal)
        made = _splash(kernel, call, piece, sums=True)
        out, (sums,) = jax.vmap(made)(*_by_head(piece.query, piece.key, piece.value), _segments(piece))
    return jnp.swapaxes(out, 1, 2), sums


def piece_backward(
    kernel: PieceKernel,
    call: AttentionCall,
    piece: ChunkPiece,
    out: jax.Array,
    sums: jax.Array,
    d_out: jax.Array,
    *,
    causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of a piece's queries, keys and values.

    `out`, its gradient `d_out` and `sums` are of all keys, not of the piece's alone.
    """
    call = dataclasses.replace(call, causal=causal)
    if kernel.name == CUDNN:
        with jax.named_scope(call.name):
            return cudnn.gradients(
                piece.query, piece.key, piece.value, out=out, sums=sums, d_out=d_out, causal=causal
            )
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
        _splash_attention_bwd,  # pyright: ignore[reportPrivateUsage]
    )

    made = _splash(kernel, call, piece, sums=False)
    names = ("mask_value", "block_sizes", "mask_function", "attn_logits_soft_cap", "interpret")
    hidden, sizes, function, cap, interpret = (made.kwargs[name] for name in names)

    def one(q: Any, k: Any, v: Any, segments: Any, out: Any, sums: Any, d_out: Any) -> Any:
        kept = (q, k, v, segments, None, out, sums, made.dq_mask_info, made.dkv_mask_info)
        grads = _splash_attention_bwd(
            False, hidden, False, sizes, None, function, cap, interpret, kept, d_out
        )
        return grads[3:6]

    q, k, v, out, d_out = _by_head(piece.query, piece.key, piece.value, out, d_out)
    with jax.named_scope(call.name):
        grads = jax.vmap(one)(q, k, v, _segments(piece), out, sums, d_out)
    dq, dk, dv = _by_head(*grads)
    return dq, dk, dv


def _by_head(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.swapaxes(x, 1, 2) for x in arrays)


def _segments(piece: ChunkPiece) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    if piece.query_ids is None or piece.key_ids is None:
        return None
    return SegmentIds(piece.query_ids, piece.key_ids)


def _splash(kernel: PieceKernel, call: AttentionCall, piece: ChunkPiece, *, sums: bool) -> Any:
    rows, key_rows = piece.query.shape[1], piece.key.shape[1]
    blocks = pair_of_blocks(rows, key_rows, (kernel.block_q, kernel.block_kv))
    assert blocks is not None
    return splash_kernel(
        call,
        queries=rows,
        keys=key_rows,
        heads=piece.query.shape[2],
        row_parts=1,
        blocks=blocks,
        name=None,
        interpret=kernel.interpret,
        sums=sums,
    )
