"""Kernels of attention in a compiled program: what they compute, and what their library works in."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..hlo.shapes import Array, leaves, parse_shape
from ..hlo.text import HloModule, Instruction
from ..ops.calls import visible_pairs
from ..ops.kernels import gradient_scratch, kernel_facts

_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dkv|dq)")
_CUDNN = re.compile(r'custom_call_target="__cudnn\$fmha\w*?(Backward)?"')
# The name scope in which `transform.attention` calls a kernel.
_CALL = re.compile(r"meshwright_attention\[([^\]]*)\]")
_SLIDING = re.compile(r"\bwindow=(\d+)")
# Where all that is hidden is in an array, cuDNN computes every score.
_ALL = re.compile(r'"mask_type": ?"NO_MASK"')
_AHEAD = re.compile(r"\bahead=(\d+)")
# Keys that stand before the first of a device's queries, where these are the last ones.
_BEFORE = re.compile(r"\bbefore=(\d+)")

# Lengths and offsets of packed rows' queries and keys.
_OFFSETS = 4

# Products of each kernel that contract or produce the head dimension of queries and keys, and those that do
# so with that of values. Each kernel computes the scores. The forward one then computes the result, "dq" the
# gradients of scores and queries, "dkv" those of scores, keys and values, cuDNN's "Backward" all of these.
_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2), "Backward": (3, 2)}


@dataclass(frozen=True, kw_only=True)
class AttentionWork:
    """A kernel of attention: its flops, a head's width, the keys that a query sees, and what it is for.

    `kernel` is its name among `ops.kernels`, `gradient` says that it is of the backward pass, `masked` that
    it reads a mask of queries by keys.
    """

    kernel: str
    flops: float
    width: float
    keys: float
    gradient: bool
    masked: bool


def attention_kernel(module: HloModule, call: Instruction) -> AttentionWork | None:
    """Return what a splash or cuDNN kernel does on the scores that its static mask leaves; None for others.

    Static are causality and a window, which `ops.attention` writes into the name scope; a kernel without one
    counts all scores.
    """
    if call.opcode != "custom-call":
        return None
    splash, cudnn = _SPLASH.search(call.op_name), _CUDNN.search(call.attributes)
    if splash is None and cudnn is None:
        return None
    part = splash[1] if splash else (cudnn and cudnn[1]) or "fwd"
    dims = [array.dims for array in _operands(module, call, ("f", "bf"))]
    if len(dims) < 3 or any(len(one) < 3 for one in dims[:3]):
        return None
    query, key, value = dims[:3]
    if splash is None:
        # cuDNN takes [batch, sequence, heads, head_dim].
        query, key = ((*one[:-3], one[-2], one[-3], one[-1]) for one in (query, key))
    # A piece of a call has a scope of its own within the call's.
    asked = "" if _ALL.search(call.attributes) else (_CALL.findall(call.op_name) or [""])[-1]
    seen = _seen(asked, key[-2])
    of_keys, of_values = _PRODUCTS[part]
    each = 2.0 * math.prod(query[:-1]) * seen
    packed = len(_operands(module, call, ("s32",))) >= _OFFSETS
    return AttentionWork(
        kernel="splash" if splash else "cudnn_packed" if packed else "cudnn",
        flops=each * (of_keys * query[-1] + of_values * value[-1]),
        width=float(query[-1]),
        keys=max(seen, 1.0),
        gradient=part != "fwd",
        masked="ScaleBias" in call.attributes,
    )


def _seen(asked: str, keys: int) -> float:
    """Return how many of `keys` a query sees on average by what a call has `asked` for.

    A device may have only some of the queries. The average over all devices is that of the whole sequence,
    unless they are said to be the last of these keys.
    """
    window, ahead, before = (word.search(asked) for word in (_SLIDING, _AHEAD, _BEFORE))
    first = int(before[1]) if before else 0
    pairs = [
        visible_pairs(
            count,
            count,
            causal="causal" in asked.split(","),
            window=int(window[1]) if window else None,
            ahead=int(ahead[1]) if ahead else 0,
        )
        for count in (keys, first)
    ]
    return (pairs[0] - pairs[1]) / (keys - first)


def unstated_scratch(module: HloModule, call: Instruction) -> float:
    """Return the bytes that a gradient by cuDNN works in, where the program was compiled without cuDNN.

    The library says how many it wants, as a result of its call ``u8[bytes]``; without it there stands 0. The
    sums of softmax that the call reads have a row of their own for each run that a packed row may have.
    """
    found = attention_kernel(module, call)
    stated = leaves(parse_shape(call.shape))[-1]
    if found is None or not found.gradient or found.kernel == "splash" or stated.dtype != "u8":
        return 0.0
    arrays = _operands(module, call, ("f", "bf"))
    if stated.elements or len(arrays) < 4:
        return 0.0
    query, key, _, sums = (array.dims for array in arrays[:4])
    facts = kernel_facts()[found.kernel]
    return math.prod(query) * gradient_scratch(facts, query[-2], key[-2], sums[0] // query[0])


def _operands(module: HloModule, call: Instruction, kinds: tuple[str, ...]) -> list[Array]:
    """Return the operands that are one array of a type that begins with one of `kinds`."""
    shapes = [leaves(parse_shape(module.instructions[name].shape)) for name in call.operands]
    return [one[0] for one in shapes if one and one[0].dtype.startswith(kinds)]
