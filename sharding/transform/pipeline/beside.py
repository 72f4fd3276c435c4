"""The schedule of several stacks of layers: in a tick each stage runs a chunk of every stack.

An encoder and a decoder, or dense layers and then experts: p stages have 1/p of each stack's layers. Stack k
of K goes forward as a stack alone does (`schedule`), k p ticks later, so that what has left stack k - 1
enters it; backward it is 2 (K - 1) - k times p ticks later. All stages still do the same in a tick:

    embed    of stack 0 as of a stack alone; of stack k what lies between it and the one before, of the
             microbatch that has left that one
    learn    the gradient of it, a tick after it has left the first stage's chunk of stack k

Both are shared by rows, as the head is. Gradients of weights that are delayed are taken in M ticks, as those
of a stack alone. Each stack takes M + p - 1 ticks forward and as many backward, and
ticks without it do not run it: stages wait no longer than with one stack. Stack k's inputs wait
2 (K - 1 - k) p ticks longer for their way back, so that many more of them are held.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from .schedule import BACKWARD, EMBED, FORWARD, HEAD, LEARN, WEIGHTS


class StackWork(NamedTuple):
    """What is done in a tick, for one of the stacks."""

    what: str
    stack: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackStretch:
    """`ticks` in which all stages do `work`."""

    work: frozenset[StackWork]
    ticks: int


def forward_later(stack: int, stages: int) -> int:
    """Return how many ticks later than alone a stack goes forward."""
    return stack * stages


def backward_later(stack: int, stacks: int, stages: int) -> int:
    """Return how many ticks later than alone a stack goes backward."""
    return (2 * (stacks - 1) - stack) * stages


def waits(stack: int, stacks: int, stages: int) -> int:
    """Return how many ticks longer than alone a stack's inputs wait for their way back.

    >>> [waits(stack, 2, 4) for stack in range(2)]
    [8, 0]
    """
    return backward_later(stack, stacks, stages) - forward_later(stack, stages)


def stretches(
    stages: int, microbatches: int, stacks: int, *, learns: bool, delayed: Sequence[int] = ()
) -> list[StackStretch]:
    """Return what is done from tick -1 on; of some stacks the gradients of weights are `delayed`.

    Embedding and learning begin or end with a stack's layers, though some of their ticks are of no
    microbatch: each stretch is compiled.

    >>> [one.ticks for one in stretches(2, 8, 2, learns=False)]
    [1, 2, 1, 6, 2]
    """
    spans = dict(_spans(stages, microbatches, stacks, learns, delayed))
    borders = sorted({tick for span in spans.values() for tick in span})
    return [
        StackStretch(
            work=frozenset(work for work, (begins, ends) in spans.items() if begins <= first < ends),
            ticks=after - first,
        )
        for first, after in itertools.pairwise(borders)
    ]


def _spans(
    stages: int, microbatches: int, stacks: int, learns: bool, delayed: Sequence[int]
) -> list[tuple[StackWork, tuple[int, int]]]:
    """Return the first tick of each work, and the one after its last."""
    found: list[tuple[StackWork, tuple[int, int]]] = []
    for stack in range(stacks):
        begins = forward_later(stack, stages)
        ends = begins + microbatches + stages - 1
        found.append((StackWork(FORWARD, stack), (begins, ends)))
        if stack == 0:
            found.append((StackWork(EMBED, 0), (-1, ends)))
        if stack < stacks - 1:
            found.append((StackWork(EMBED, stack + 1), (begins, ends)))
        else:
            found.append((StackWork(HEAD, stack), (ends - microbatches, ends)))
        if not learns:
            continue
        begins = backward_later(stack, stacks, stages) + stages - 1
        ends = begins + microbatches + stages - 1
        found.append((StackWork(BACKWARD, stack), (begins, ends)))
        if stack in delayed:
            found.append((StackWork(WEIGHTS, stack), (begins + stages, ends + 1)))
        if stack == 0:
            found.append((StackWork(LEARN, 0), (begins, ends + 1)))
        if stack < stacks - 1:
            found.append((StackWork(LEARN, stack + 1), (begins, ends)))
    return found
