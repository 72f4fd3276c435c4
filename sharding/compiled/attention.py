"""Products inside kernels of attention, which say nothing of them, from shapes and the scope's name."""

from __future__ import annotations

import math
import re

from ..hlo.shapes import leaves, parse_shape
from ..hlo.text import Instruction, Program
from ..ops.attention import visible_pairs

_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dkv|dq)")
_CUDNN = re.compile(r'custom_call_target="__cudnn\$fmha\w*?(Backward)?"')
# The scope that `transform.attention` lays around a kernel.
_CALL = re.compile(r"meshwright_attention\[([^\]]*)\]")
_WINDOW = re.compile(r"\bwindow=(\d+)")

# Products of each kernel over the width of queries and keys, and over that of values: scores again in each,
# then the result; the gradient of scores, of queries; of scores, of keys and of values; or of all of these.
_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2), "Backward": (3, 2)}


def attention_flops(program: Program, call: Instruction) -> float:
    """Return the flops of a kernel of splash or cuDNN, of the scores that no mask known beforehand hides.

    0 for any other instruction. A kernel that nobody asked for by `ops.attention` counts all scores.
    """
    if call.opcode != "custom-call":
        return 0.0
    splash, cudnn = _SPLASH.search(call.op_name), _CUDNN.search(call.attributes)
    if splash is None and cudnn is None:
        return 0.0
    kernel = splash[1] if splash else (cudnn and cudnn[1]) or "fwd"
    shapes = [leaves(parse_shape(program.instructions[name].shape)) for name in call.operands]
    arrays = [found[0].dims for found in shapes if found and found[0].dtype.startswith(("f", "bf"))]
    if len(arrays) < 3 or any(len(dims) < 3 for dims in arrays[:3]):
        return 0.0
    query, key, value = arrays[:3]
    if splash is None:
        # cuDNN takes [batch, sequence, heads, head_dim].
        query, key = ((*dims[:-3], dims[-2], dims[-3], dims[-1]) for dims in (query, key))
    asked = _CALL.search(call.op_name)
    window = _WINDOW.search(asked[1]) if asked else None
    # A device may have a part of the queries; over all parts as many keys are seen as by a whole sequence.
    keys = key[-2]
    seen = visible_pairs(
        keys,
        keys,
        causal=asked is not None and "causal" in asked[1].split(","),
        window=int(window[1]) if window else None,
    )
    of_keys, of_values = _PRODUCTS[kernel]
    return 2.0 * math.prod(query[:-1]) * seen / keys * (of_keys * query[-1] + of_values * value[-1])
