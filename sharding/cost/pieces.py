"""Seconds of a device's part of attention over `context`: blocks in plain XLA, what a ring adds to kernels.

Counted are the passes that compiled steps make over memory, in bytes: `i` of a number as arrays have it, 4 of
one in float32.

**Blocks** (`ops.context.blocks`), in each turn, with Q, O, K and V numbers of the pair's queries, results,
keys and values, and P scores:

- forward on GPUs: rows are cut out (2i each), the product of scores reads them and writes these (i(Q + K) +
  4P), the largest are looked for (4P), weights and their sums made (4P + iP), weights multiplied with values
  (iP + iV + 4O), and the result so far is scaled, added to and put back (24O): in all (12 + 2i)P + 3i(Q + K +
  V) + 28O.
- backward: rows are cut out, scores and their gradient are products (8P), both are read once and become
  weights and gradients of scores (8P + 2iP), which three products read (3iP); each sum is read, added to and
  put back (4 + 12; of keys that a group of heads shares 8 for each head's own): in all, without groups,
  (16 + 5i)P + (4i + 16)(Q + K) + 4iO + (3i + 16)V.
- on TPUs, whose scores lie in vector memory, what libtpu's cycles of a turn come to: ``turns.toml``. Sums too
  large for it are read and written in each turn besides: 8O; backward 8(Q + K + V).

A **bias** that is worked out for each turn has N numbers of its own, fewer than scores where it has no batch
or is the same for all heads. On GPUs it is made as it is added, without a byte, but one of distances alone is
laid out in steps, each with twice the rows of the last: L numbers in all of them, written and read both ways
(8L). What it learns is summed over float32 gradients of scores (8P). TPUs' cycles are in ``turns.toml`` too.
An **array of pairs** (a mask, a bias, a factor) has N numbers of `i` bytes in a turn, read both ways (iN);
what it learns is read, added to and put back besides (8P + 8N).

**Around blocks**, of all that a device has or has fetched:

- forward: rows are put in blocks (2i(Q + K + V)), sums begin as zeros and end as a result (8O), which is put
  back into rows (3iO).
- backward: rows and the result's gradient are put in blocks (2i(Q + K + V + O)), that is multiplied with the
  result (2iO); sums begin as zeros, become gradients and are put back into rows ((8 + 3i)(Q + K + V)).
- what goes into balanced order and out of it, or is traded for heads, is taken apart and put together each
  way: 4i for each number of it.

A TPU takes as many cycles for copies of numbers of two bytes as of four: there i is no less than 4.

**A ring** adds for each chunk what comes and is sent (2i(K + V)), and backward the sum of what came and of
what was found, made from zeros: 22(K + V).

**Kernels of a ring's pieces** have arrays with heads first (2i for each that they read), float32 results (i +
4), merged with what there is (12 of each); a causal ring cuts halves out (2i for each array that is read) and
puts results together (8). A row's sums fill vector registers of 128 lanes, 4 bytes each.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..hardware.chip import Chip
from ..ops.biases import BATCH as OF_BATCH
from ..ops.biases import HEADS as OF_HEADS
from ..ops.biases import PlacedBias
from ..ops.context.pieces import SPLASH
from ..ops.context.taken import BLOCKS, CONTEXT, Site, Taken
from ..ops.context.turns import TurnCounts, turns_of
from ..ops.context.ways import HEADS, NEIGHBOURS, RING, copies_of, is_balanced, reach_of
from .calibration import Calibration, read_toml
from .compute import AttendedSeconds, attention_share, peak_flops, product_share

_TURNS = Path(__file__).with_name("turns.toml")
# Whose cycles a TPU without a table has.
_USUAL = "v5p"
# Bytes of a row's sum in vector registers, of a float32 number.
_LANES, _WIDE = 128, 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Numbers:
    """Numbers of queries, results, keys and values, of a device or of a turn; `item` bytes each."""

    query: float
    out: float
    key: float
    value: float
    item: int

    def times(self, share: float, key_share: float) -> _Numbers:
        """Return parts of queries and results, and of keys and values."""
        return dataclasses.replace(
            self,
            query=self.query * share,
            out=self.out * share,
            key=self.key * key_share,
            value=self.value * key_share,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What works a call through: the chip, its efficiencies, and those with the call's kernel."""

    chip: Chip
    calibration: Calibration
    of_kernel: Calibration

    @property
    def rate(self) -> float:
        """Bytes a second of elementwise work, as a compiled step's is read."""
        share = self.calibration.memory_efficiency
        if self.chip.platform == "tpu":
            share = self.calibration.fusion_efficiency
        return (self.chip.hbm_bytes_per_second or math.inf) * share


def attended_seconds(
    site: Site, found: Taken, machine: Machine, *, microbatches: int, gradient: float
) -> AttendedSeconds | None:
    """Return the seconds of a call as it lies, None where its kernel's work alone says it.

    Args:
      site: the call on its mesh.
      found: what carries it out.
      machine: what it runs on.
      microbatches: parts of the batch that come one after another.
      gradient: the work of the kernel's backward pass over that of its forward pass.
    """
    if found.way is None or (found.by != BLOCKS and found.way not in (RING, NEIGHBOURS)):
        return None
    if found.by != BLOCKS and found.way == NEIGHBOURS:
        return _of_neighbours(site, machine, microbatches=microbatches, gradient=gradient)
    batch, queries, _, wide = site.query.shape
    keys, value_wide = site.key.shape[1], site.value.shape[3]
    parts, sizes = site.mesh[CONTEXT], site.sizes
    heads, kv_heads = sizes.heads, sizes.kv_heads
    if found.way == HEADS:
        heads, kv_heads = heads // parts, kv_heads * copies_of(kv_heads, parts) // parts
    rows = batch / site.parts(0) / microbatches
    turns = turns_of(site.call, found.way, queries=queries, keys=keys, parts=parts, whole=sizes.whole)
    mine, there = (queries, keys) if found.way == HEADS else (queries // parts, keys // parts)
    each = _Numbers(
        query=rows * heads * wide,
        out=rows * heads * value_wide,
        key=rows * kv_heads * wide,
        value=rows * kv_heads * value_wide,
        item=site.key.dtype.itemsize,
    )
    whole = each.times(mine, there)
    if found.by == BLOCKS:
        pair = each.times(turns.rows, turns.key_rows)
        scores = rows * heads * turns.rows * turns.key_rows
        turn = _turn(pair, whole, scores, site, turns, machine)
        if (placed := site.call.placed) is not None:
            turn = turn.plus(_of_bias(placed, scores, rows=rows, heads=heads, turns=turns, machine=machine))
        if site.of_pairs:
            turn = turn.plus(_of_pairs(site, scores, turns, machine))
        worked = _with_ring(turn, whole, turns, machine)
        fetched = each.times(mine, _rows_of_keys(site, found.way))
        around = _around(fetched, whole, site, found.way, machine)
        return worked.plus(around)
    scores = rows * heads * site.call.visible(queries, keys) / parts
    return _by_kernel(scores, whole, site, found, turns, machine, gradient)


def _rows_of_keys(site: Site, way: str) -> int:
    """Return how many rows of keys are there before the first turn: in a ring a device's own."""
    keys, parts = site.key.shape[1], site.mesh[CONTEXT]
    if way == NEIGHBOURS:
        return (reach_of(site.call, keys, parts) + 1) * keys // parts
    return keys // parts if way == RING else keys


def _copied(item: int, machine: Machine) -> int:
    """Return the bytes of a number of `item` bytes that copying one takes as long as."""
    return max(item, 4) if machine.chip.platform == "tpu" else item


def _around(fetched: _Numbers, own: _Numbers, site: Site, way: str, machine: Machine) -> AttendedSeconds:
    """Return the seconds of what is done around all turns with what a device has `fetched`, or has itself."""
    i, read = _copied(own.item, machine), fetched.query + fetched.key + fetched.value
    moved = 0.0
    if way == HEADS:
        moved = 4 * i * (own.query + own.out + own.key + own.value)
    elif is_balanced(site.call, way, site.query.shape[1], site.mesh[CONTEXT]):
        moved = 4 * i * (own.query + own.out + (own.key + own.value if way == RING else 0.0))
    forward = 2 * i * read + (8 + 3 * i) * own.out + moved
    backward = (8 + 5 * i) * read + 4 * i * own.out + moved
    return AttendedSeconds(forward=forward / machine.rate, backward=backward / machine.rate)


def _turn(
    pair: _Numbers, whole: _Numbers, scores: float, site: Site, turns: TurnCounts, machine: Machine
) -> AttendedSeconds:
    """Return the seconds of one turn of blocks, with a `pair` of a device's `whole` rows."""
    if machine.chip.platform == "tpu":
        known = _cycles_of(machine.chip)
        numbers = (pair.query + pair.out + pair.key + pair.value) / 4.0
        # Picoseconds are of numbers of two bytes.
        seconds = [
            known["turn"][n] + 1e-12 * (known["score"][n] * scores + known["row"][n] * numbers)
            for n in range(2)
        ]
        holds = machine.chip.vmem_bytes or math.inf
        sums = pair.out, pair.query + pair.key + pair.value
        kept = whole.out, whole.query + whole.key + whole.value
        forward, backward = (
            one + (8 * rows / machine.rate if _WIDE * all_rows >= holds else 0.0)
            for one, rows, all_rows in zip(seconds, sums, kept, strict=True)
        )
        return AttendedSeconds(forward=forward, backward=backward)
    i, wide, value_wide = pair.item, site.query.shape[3], site.value.shape[3]
    # Keys that a group of heads shares have a sum of each head's before the group's.
    by_head = scores / turns.rows
    of_scores = wide, i * (pair.query + pair.key) + 4 * scores
    of_weights = value_wide, i * (pair.out + pair.value) + 4 * scores
    forward = (of_scores, (value_wide, i * scores + i * pair.value + 4 * pair.out))
    backward = (
        *(of_scores, of_weights),
        (wide, i * scores + i * pair.key + 4 * pair.query),
        (wide, i * scores + i * pair.query + 4 * wide * by_head),
        (value_wide, i * scores + i * pair.out + 4 * value_wide * by_head),
    )
    cut = 2 * i * (pair.query + pair.key + pair.value)
    other = cut + (8 + i) * scores + 24 * pair.out
    back = cut + 2 * i * pair.out + (8 + 2 * i) * scores + 12 * pair.query + 8 * (pair.key + pair.value)
    back += 4 * (wide + value_wide) * by_head
    return AttendedSeconds(
        forward=other / machine.rate + _products(forward, scores, turns, site, machine),
        backward=back / machine.rate + _products(backward, scores, turns, site, machine),
    )


def _of_bias(
    bias: PlacedBias, scores: float, *, rows: float, heads: int, turns: TurnCounts, machine: Machine
) -> AttendedSeconds:
    """Return the seconds that a bias takes in one turn of so many scores, of `rows` of the batch."""
    each = (rows if bias.has(OF_BATCH) else 1.0) * (heads if bias.has(OF_HEADS) else 1)
    if machine.chip.platform == "tpu":
        known, numbers = _cycles_of(machine.chip), each * turns.rows * turns.key_rows * bias.by_line
        forward, backward = (
            1e-12 * (known["added"][n] * scores + known["laid"][n] * numbers) for n in range(2)
        )
        return AttendedSeconds(forward=forward, backward=backward)
    laid = 8 * each * _laid(turns.rows, turns.key_rows) * bias.by_line
    learnt = 8 * scores * bias.may_learn
    return AttendedSeconds(forward=laid / machine.rate, backward=(laid + learnt) / machine.rate)


def _of_pairs(site: Site, scores: float, turns: TurnCounts, machine: Machine) -> AttendedSeconds:
    """Return the seconds in which a turn of so many scores reads its part of arrays of pairs, and adds to it.

    What is learnt is summed over float32 gradients of scores, and read, added to and put back.
    """
    forward = backward = 0.0
    mine = site.query.shape[1] / site.mesh[CONTEXT] * site.key.shape[1]
    share = turns.rows * turns.key_rows / mine
    for one in site.of_pairs:
        numbers = min(site.numbers(one) * share, scores)
        forward += one.dtype.itemsize * numbers
        learns = np.issubdtype(one.dtype, np.inexact)
        backward += one.dtype.itemsize * numbers + learns * (8 * scores + 8 * numbers)
    return AttendedSeconds(forward=forward / machine.rate, backward=backward / machine.rate)


def _laid(rows: int, keys: int) -> int:
    """Return the numbers of a block of a bias of distances in all steps that lay it out.

    From one row on, each step's rows are those of the last and the same further on: they are as long as what
    is left of all distances.
    """
    numbers, there, width = 0, 1, rows + keys - 1
    while there < rows:
        more = min(rows - there, there)
        there, width = there + more, width - more
        numbers += there * width
    return numbers


def _products(
    products: Iterable[tuple[int, float]], scores: float, turns: TurnCounts, site: Site, machine: Machine
) -> float:
    """Return the seconds of products of `scores` and rows so wide, which move so many bytes."""
    dtype = str(site.query.dtype)
    peak = peak_flops(machine.chip, dtype)
    if dtype == "float32":
        peak *= machine.calibration.float32_efficiency
    seconds = 0.0
    for wide, moved in products:
        sizes = np.array([[turns.rows, turns.key_rows, wide]], float)
        reached = float(product_share(sizes, machine.calibration)[0])
        seconds += max(2.0 * scores * wide / (peak * reached), moved / machine.rate)
    return seconds


def _with_ring(
    turn: AttendedSeconds, whole: _Numbers, turns: TurnCounts, machine: Machine
) -> AttendedSeconds:
    """Return the seconds of all turns, with what a ring adds to those of each chunk."""
    came = whole.key + whole.value
    sent = 2 * _copied(whole.item, machine) * came / machine.rate
    return AttendedSeconds(
        forward=turns.pairs * turn.forward + turns.chunks * sent,
        backward=turns.pairs * turn.backward + turns.chunks * (sent + 22 * came / machine.rate),
    )


def _by_kernel(
    scores: float,
    whole: _Numbers,
    site: Site,
    found: Taken,
    turns: TurnCounts,
    machine: Machine,
    gradient: float,
) -> AttendedSeconds:
    """Return the seconds of a ring whose pieces are a kernel's."""
    wide, value_wide = site.query.shape[3], site.value.shape[3]
    parts = site.mesh[CONTEXT]
    halves = is_balanced(site.call, RING, site.query.shape[1], parts)
    keys = site.key.shape[1] / parts / (1 + halves)
    reached = attention_share(np.array([float(wide)]), np.array([keys]), machine.of_kernel)[0]
    computed = 2.0 * scores * (wide + value_wide) / (peak_flops(machine.chip, "bfloat16") * reached)
    i, read = whole.item, whole.query + whole.key + whole.value
    again = 2 * i * (2 if halves else 1)
    sums = whole.query / wide * _LANES * _WIDE * (2 if halves else 1) if found.by == SPLASH else 0.0
    sent = 2 * i * (whole.key + whole.value)
    together = 8 * halves
    moved = again * read + sent + (i + 4 + 12 + together) * whole.out + sums
    back = again * (read + 2 * whole.out) + sent + 2 * i * whole.out
    back += (i + 4 + 12 + together) * read
    return AttendedSeconds(
        forward=computed + turns.chunks * moved / machine.rate,
        backward=gradient * computed + turns.chunks * back / machine.rate,
    )


def _of_neighbours(site: Site, machine: Machine, *, microbatches: int, gradient: float) -> AttendedSeconds:
    """Return the seconds of a kernel's work on a device that has neighbours before it: all but the first."""
    call, parts, sizes = site.call, site.mesh[CONTEXT], site.sizes
    batch, queries, _, wide = site.query.shape
    before = reach_of(call, sizes.keys, parts) * sizes.keys // parts
    rows = queries // parts
    seen = call.visible(before + rows, before + rows) - call.visible(before, before)
    scores = batch / site.parts(0) / microbatches * sizes.heads * seen
    keys = np.array([seen / rows])
    reached = attention_share(np.array([float(wide)]), keys, machine.of_kernel)[0]
    products = 2.0 * scores * (wide + site.value.shape[3])
    forward = products / (peak_flops(machine.chip, "bfloat16") * reached)
    return AttendedSeconds(forward=forward, backward=gradient * forward)


def _cycles_of(chip: Chip) -> Mapping[str, Any]:
    tables = _tables()
    return tables.get(chip.name, tables[_USUAL])


@functools.cache
def _tables() -> Mapping[str, Any]:
    return read_toml(_TURNS)
