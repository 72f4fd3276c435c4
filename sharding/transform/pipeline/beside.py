"""The schedule of several stacks of layers: in a tick each stage runs a chunk of every stack.

An encoder and a decoder, or dense layers and then experts: p stages have 1/p of each stack's layers, in v
chunks of each. Stack k of K goes forward as a stack alone does (`schedule`), k p v ticks later, so that what
has left stack k - 1 enters it; backward it is 2 (K - 1) - k times p v ticks later. All stages still do the
same in a tick:

    embed    of stack 0 as of a stack alone; of stack k what lies between it and the one before, of the
             microbatch that has left that one
    learn    the gradient of it, a tick after it has left the first stage's first chunk of stack k

Both are shared by rows, as the head is. Of several chunks they are all in the same p of p v ticks, those in
which microbatches enter a stack, since every stack is later by groups of microbatches. Gradients of weights
that are delayed are taken in v M ticks, as those of a stack alone. Each stack takes v M + p - 1 ticks forward
and as many backward, and ticks without it do not run it: stages wait no longer than with one stack. Stack k's
inputs wait 2 (K - 1 - k) p v ticks longer for their way back, so that many more of them are held.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .schedule import BACKWARD, EMBED, FORWARD, HEAD, LEARN, WEIGHTS, Rounds, Stretch


class StackWork(NamedTuple):
    """What is done in a tick, for one of the stacks."""

    what: str
    stack: int


def forward_later(stack: int, stages: int, chunks: int = 1) -> int:
    """Return how many ticks later than alone a stack goes forward."""
    return stack * stages * chunks


def backward_later(stack: int, stacks: int, stages: int, chunks: int = 1) -> int:
    """Return how many ticks later than alone a stack goes backward."""
    return (2 * (stacks - 1) - stack) * stages * chunks


def waits(stack: int, stacks: int, stages: int, chunks: int = 1) -> int:
    """Return how many ticks longer than alone a stack's inputs wait for their way back.

    >>> [waits(stack, 2, 4) for stack in range(2)]
    [8, 0]
    """
    return backward_later(stack, stacks, stages, chunks) - forward_later(stack, stages, chunks)


def stack_rounds(
    stages: int,
    microbatches: int,
    stacks: int,
    chunks: int = 1,
    *,
    learns: bool,
    delayed: Sequence[int] = (),
) -> list[Rounds]:
    """Return what is done from tick -1 on; of some stacks the gradients of weights are `delayed`.

    With one chunk, embedding and learning begin or end with a stack's layers, though some of their ticks are
    of no microbatch: each stretch is compiled.

    >>> [one.ticks for one in stack_rounds(2, 8, 2, learns=False)]
    [1, 2, 1, 6, 2]
    >>> [(one.times, one.ticks) for one in stack_rounds(2, 8, 2, 2, learns=False)]
    [(1, 4), (1, 4), (2, 4), (1, 4), (1, 2)]
    """
    spans = list(_spans(stages, microbatches, stacks, chunks, learns, delayed))
    period = stages * chunks
    last = max(one.after for one in spans)
    work = [frozenset(one.work for one in spans if one.has(tick, stages, period)) for tick in range(-1, last)]
    if chunks == 1:
        return [Rounds(stretches=(one,)) for one in _stretches(work)]
    groups = [tuple(_stretches(work[first : first + period])) for first in range(0, len(work), period)]
    return [Rounds(stretches=one, times=len([*same])) for one, same in itertools.groupby(groups)]


def _stretches(work: Iterable[frozenset[StackWork]]) -> list[Stretch]:
    """Return ticks that follow one another with the same work, together."""
    return [Stretch(work=one, ticks=len([*same])) for one, same in itertools.groupby(work)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _WorkSpan:
    """The first tick of some work, and the one after its last; `shared` by rows it is not in all of them."""

    work: StackWork
    first: int
    after: int
    shared: bool = False

    def has(self, tick: int, stages: int, period: int) -> bool:
        """Whether there is this work in a tick: what is shared, where microbatches enter a stack."""
        return self.first <= tick < self.after and (not self.shared or (tick + 1) % period < stages)


def _spans(
    stages: int, microbatches: int, stacks: int, chunks: int, learns: bool, delayed: Sequence[int]
) -> Iterable[_WorkSpan]:
    """Yield the ticks of each work."""
    period = stages * chunks
    # Several chunks take microbatches in groups of as many as stages.
    count = microbatches if chunks == 1 else -(-microbatches // stages) * period
    # What is shared has no tick in vain where that makes no more stretches.
    begun = 0 if chunks == 1 else period - 1

    def shared(what: str, stack: int, first: int, after: int) -> _WorkSpan:
        return _WorkSpan(work=StackWork(what, stack), first=first, after=after, shared=True)

    for stack in range(stacks):
        first = forward_later(stack, stages, chunks)
        after = first + count + stages - 1
        yield _WorkSpan(work=StackWork(FORWARD, stack), first=first, after=after)
        if stack == 0:
            yield shared(EMBED, 0, -1, after)
        if stack < stacks - 1:
            yield shared(EMBED, stack + 1, first + begun, after)
        else:
            yield shared(HEAD, stack, first + period - 1, after)
        if not learns:
            continue
        first = backward_later(stack, stacks, stages, chunks) + period - 1
        after = first + count + stages - 1
        yield _WorkSpan(work=StackWork(BACKWARD, stack), first=first, after=after)
        if stack in delayed:
            yield _WorkSpan(work=StackWork(WEIGHTS, stack), first=first + stages, after=after + 1)
        if stack == 0:
            yield shared(LEARN, 0, first + (0 if chunks == 1 else period), after + 1)
        if stack < stacks - 1:
            yield shared(LEARN, stack + 1, first, after)
