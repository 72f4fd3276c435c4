"""Splash's tables of blocks are the same by masks that are looked at only where they change."""

import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from meshwright.sharding.ops.kernels import pair_of_blocks
from meshwright.sharding.ops.masks import causal_of, full_of, window_of

TOKENS, BLOCK = 1024, 128


def tables(mask, parts=1, block=BLOCK):
    sizes = dict.fromkeys(
        ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), block
    )
    kernel = splash.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * 2),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=parts,
    )
    return [
        (one.data_next, one.mask_next, one.block_mask, one.partial_mask_blocks, one.q_sequence)
        for one in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    ]


def alike(ours, theirs):
    for a, b in zip(sum(ours, ()), sum(theirs, ()), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("before", [0, 256])
def test_tables_are_those_of_jaxs_own_masks(before, parts):
    shape = (TOKENS, TOKENS)
    own = masks.CausalMask(shape, offset=before, shard_count=parts)
    alike(tables(causal_of(shape, before, parts), parts), tables(own, parts))
    for window in ((127, 0), (200, 0), (None, 3), (300, 128)):
        own = masks.LocalMask(shape, window_size=window, offset=before, shard_count=parts)
        alike(tables(window_of(shape, *window, before, parts), parts), tables(own, parts))


def test_tables_of_queries_in_another_order_and_of_masks_of_all_keys():
    shape = (TOKENS, TOKENS)
    ours, theirs = causal_of(shape, 0, 2), masks.CausalMask(shape, shard_count=2)
    ours.q_sequence = theirs.q_sequence = (
        np.arange(TOKENS, dtype=np.int32).reshape(4, -1)[[0, 3, 1, 2]].reshape(-1)
    )
    alike(tables(ours, 2), tables(theirs, 2))
    alike(tables(full_of((TOKENS, 2 * TOKENS))), tables(masks.FullMask((TOKENS, 2 * TOKENS))))


def test_only_blocks_at_an_edge_are_read():
    mask = causal_of((64 * BLOCK, 64 * BLOCK), 0, 1)
    read, function = [], mask.mask_function
    mask.mask_function = lambda rows, keys: read.append(0) or function(rows, keys)
    tables(mask)
    # The diagonal's, once for each of a kernel's passes over pairs: 4,096 are there.
    assert len(read) <= 10 * 64


@pytest.mark.parametrize(
    ("rows", "keys", "blocks"),
    [
        (8192, 8192, (1024, 1024)),
        (1536, 4096, (768, 1024)),
        # 512 x 512 pairs fit a chip's scalar memory, 1024 x 1024 do not; 128 x 1024 do.
        (1 << 19, 1 << 19, (1024, 1024)),
        (1 << 20, 1 << 20, None),
        (1 << 17, 1 << 20, (1024, 1024)),
        (1000, 1024, None),
    ],
)
def test_pairs_of_blocks_fit_what_the_chip_has(rows, keys, blocks):
    assert pair_of_blocks(rows, keys, (1024, 1024)) == blocks
