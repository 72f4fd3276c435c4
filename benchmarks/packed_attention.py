"""Packed rows as compiled for H100, v5e and v5p: arrays of sequence by sequence in a step, and its memory.

``python benchmarks/packed_attention.py [TOPOLOGY ...]`` compiles two layers of attention, 32 heads over 8 of
keys, 8 rows of 4096 tokens, no device needed; a line for each way. ``--rows``, ``--sequence`` and ``--width``
(of a head, ``192/128`` with narrower values) ask for other sizes.

Squared are arrays in memory with two dimensions of the whole sequence, which `sequence_squared` counts.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from meshwright.sharding import Plan, UserError, plan
from meshwright.sharding.ops import attention

LAYERS, EMBED, HEADS, KV_HEADS = 2, 2048, 32, 8
TOPOLOGIES = ("h100:1x1", "v5e:1x1", "v5p:1x1x1")
# Way → what the call of attention asks for besides, what the plan declares, and the type.
GPU: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "cudnn": ({}, {"attention": "cudnn"}, "bfloat16"),
    "cudnn, window 1024": ({"window": 1024}, {"attention": "cudnn"}, "bfloat16"),
    "cudnn_packed, 8 segments": ({}, {"attention": "cudnn_packed", "segments": 8}, "bfloat16"),
    "cudnn_packed, 32 segments": ({}, {"attention": "cudnn_packed", "segments": 32}, "bfloat16"),
    "cudnn_packed, 128 segments": ({}, {"attention": "cudnn_packed", "segments": 128}, "bfloat16"),
    "soft cap (XLA)": ({"cap": 50.0}, {}, "bfloat16"),
    "float32 (XLA)": ({}, {}, "float32"),
}
TPU: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "splash": ({}, {}, "bfloat16"),
    "splash, window 1024": ({"window": 1024}, {}, "bfloat16"),
    "splash, soft cap": ({"cap": 50.0}, {}, "bfloat16"),
    "splash, float32": ({}, {}, "float32"),
}


def planned(
    topology: str, rows: int, sequence: int, width: tuple[int, int], options: Any, declared: Any, dtype: str
) -> Plan:
    """Return the plan of two layers of attention on `topology`."""

    def loss(params: Any, batch: Any) -> Any:
        def layer(x: Any, w: Any) -> tuple[Any, None]:
            arrays = (jnp.einsum("bse,ehd->bshd", x, w[name]) for name in ("query", "key", "value"))
            out = attention(*arrays, segment_ids=batch["segments"], **options)
            return x + jnp.einsum("bshd,hde->bse", out, w["output"]), None

        x, _ = jax.lax.scan(layer, batch["x"], params)
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    shape = jax.ShapeDtypeStruct
    wide, value_wide = width
    params = {
        "query": shape((LAYERS, EMBED, HEADS, wide), dtype),
        "key": shape((LAYERS, EMBED, KV_HEADS, wide), dtype),
        "value": shape((LAYERS, EMBED, KV_HEADS, value_wide), dtype),
        "output": shape((LAYERS, HEADS, value_wide, EMBED), dtype),
    }
    batch = {"x": shape((rows, sequence, EMBED), dtype), "segments": shape((rows, sequence), "int32")}
    fixed = {"topology": topology, "optimizer": optax.sgd(1e-3), "remat": "none", "microbatches": 1}
    return plan(loss, params, batch, **fixed, **declared)


def line(topology: str, name: str, args: argparse.Namespace, way: Any) -> str:
    """Return what a way's step compiles to."""
    wide, _, narrow = args.width.partition("/")
    try:
        proof = (
            planned(topology, args.rows, args.sequence, (int(wide), int(narrow or wide)), *way).verify().proof
        )
    except UserError as error:
        return f"{topology:9} {name:27} not compiled: {str(error)[:160]}"
    assert proof is not None
    found = [one for one in proof.findings if one.kind == "sequence_squared"]
    squared = sum(int(match[1]) for one in found if (match := re.search(r"(\d+) times", one.what)))
    largest = max((one.bytes for one in found), default=0.0)
    temporaries, peak = proof.memory["temporaries"] / 2**20, proof.peak_bytes / 2**20
    return (
        f"{topology:9} {name:27} squared {squared:2}, largest {largest / 2**20:6.0f} MiB; "
        f"temporaries {temporaries:6.0f}, peak {peak:6.0f} MiB"
    )


def main() -> None:
    """Compile every way on every topology and print a line of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("topologies", nargs="*", default=TOPOLOGIES)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--width", default="128")
    args = parser.parse_args()
    shape = f"{args.rows} x {args.sequence}, heads {HEADS} over {KV_HEADS}, {args.width} wide"
    print(f"jax {jax.__version__}, {shape}")
    for topology in args.topologies:
        for name, way in (TPU if topology.startswith("v") else GPU).items():
            print(line(topology, name, args, way), flush=True)


if __name__ == "__main__":
    main()
