"""The schedule of a pipeline: what all stages do in a tick, and which part of the batch that is of.

p stages hold v chunks of layers each: chunk r of stage s is the (r p + s)-th, so that what leaves the last
stage goes on in the first one's next chunk. M microbatches go through them (1F1B; interleaved if v > 1). All
stages do the same in a tick, so that there is no conditional and one program for all:

    embed    the rows of the next tick's microbatch, on their way into the first stage
    forward  stage s takes unit u = t - s
    head     the rows of the microbatch that has left the last chunk, to the loss and back
    backward stage s takes unit u = t - (p v - 1) - (p - 1 - s)
    learn    the gradient of what embedded the rows that left the first chunk a tick ago

Unit u is of microbatch p (u // p v) + u mod p, in chunk (u mod p v) // p forward and v - 1 less that
backward: several chunks take the microbatches in groups of p.

Embedding and head are shared by rows: each stage takes 1/p of a microbatch's. So they take M ticks, as if the
layers' stages did not wait; forward and backward take v M + p - 1, of one chunk each. A stage holds 2 p v - 1
inputs of chunks, however many microbatches there are.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

EMBED, FORWARD, HEAD, BACKWARD, LEARN = "embed", "forward", "head", "backward", "learn"
# What stages hand on between these, for profiles.
SEND = "send"
_SCOPE = "pipeline_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """`ticks` in which all stages do `work`."""

    work: frozenset[str]
    ticks: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounds:
    """Stretches that follow one another, and all of that again, `times` in all."""

    stretches: tuple[Stretch, ...]
    times: int = 1

    @property
    def ticks(self) -> int:
        """Ticks of one round."""
        return sum(one.ticks for one in self.stretches)


class Unit(NamedTuple):
    """A microbatch, which is none below 0 and beyond the last, and the chunk that it is in."""

    microbatch: Any
    chunk: Any


def scope_of(work: str) -> str:
    """Return the name scope of some work in a compiled program.

    >>> work_of(f"jit(step)/transpose({scope_of(FORWARD)})/dot_general")
    'forward'
    """
    return f"{_SCOPE}{work}"


def named(work: str) -> Any:
    """Return the scope of some work, by which profiles tell it."""
    return jax.named_scope(scope_of(work))


def work_of(name: str) -> str | None:
    """Return which work an operation of such a name is of, None for what is outside of a pipeline's ticks."""
    found = re.findall(rf"{_SCOPE}([a-z]+)", name)
    return found[-1] if found else None


def rounds(stages: int, microbatches: int, chunks: int = 1, *, learns: bool) -> list[Rounds]:
    """Return what is done from tick -1 on.

    >>> [(one.times, one.ticks, sorted(one.stretches[0].work)) for one in rounds(2, 8, learns=False)]
    [(1, 1, ['embed']), (1, 1, ['embed', 'forward']), (1, 8, ['embed', 'forward', 'head'])]
    """
    back = {BACKWARD, LEARN} if learns else set()
    full, layers = {EMBED, FORWARD, HEAD, *back}, {FORWARD, *({BACKWARD} if learns else ())}
    between = (chunks - 1) * stages
    groups = -(-microbatches // stages)
    found = [_once({EMBED}, 1), _once({EMBED, FORWARD}, stages - 1), _once({FORWARD}, between)]
    if chunks == 1:
        found.append(_once(full, microbatches))
    else:
        both = _once(full, stages).stretches + _once(layers, between).stretches
        found += [Rounds(stretches=both, times=groups - 1), _once(full, stages)]
    if learns:
        found += [_once({BACKWARD}, between), _once({BACKWARD, LEARN}, stages - 1), _once({LEARN}, 1)]
    return [one for one in found if one.ticks and one.times]


def _once(work: set[str], ticks: int) -> Rounds:
    return Rounds(stretches=(Stretch(work=frozenset(work), ticks=ticks),))


def ring(stages: int, chunks: int = 1) -> int:
    """Return of how many chunks a stage holds the input."""
    return 2 * stages * chunks - 1


def forward_at(tick: Any, stage: Any, stages: int, chunks: int = 1) -> Unit:
    """Return what a stage takes forward."""
    return _unit(tick - stage, stages, chunks)


def backward_at(tick: Any, stage: Any, stages: int, chunks: int = 1) -> Unit:
    """Return what a stage takes backward."""
    found = _unit(tick - (stages * chunks - 1) - (stages - 1 - stage), stages, chunks)
    return Unit(found.microbatch, chunks - 1 - found.chunk)


def ticks_since(unit: Unit, stage: Any, stages: int, chunks: int = 1) -> Any:
    """Return how long ago a stage took forward what it takes backward now."""
    return 2 * (stages * chunks - 1 - stage - stages * unit.chunk)


def _unit(number: Any, stages: int, chunks: int) -> Unit:
    if chunks == 1:
        return Unit(number, 0)
    within = number % (stages * chunks)
    return Unit(stages * (number // (stages * chunks)) + within % stages, within // stages)


def is_one(microbatch: Any, microbatches: int) -> Any:
    """Whether there is such a microbatch."""
    return (microbatch >= 0) & (microbatch < microbatches)


def nearest_one(microbatch: Any, microbatches: int) -> Any:
    """Return the microbatch, or the first or last one."""
    return jnp.clip(microbatch, 0, microbatches - 1)
