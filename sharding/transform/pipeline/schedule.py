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
inputs of chunks, however many microbatches there are. Where p do not share the rows out, fewer do, and the
others work the same shares with them (`sharing`).

Where the gradients of layers' weights are delayed, the backward work gives what stages hand back alone, and

    weights  all stages take the unit that the first took back a tick ago

of what stage s has kept for s + 1 ticks: v M ticks, so that stages wait for one another in two of three parts
of their work, and not in this. A stage holds p chunks' residuals besides.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

EMBED, FORWARD, HEAD, BACKWARD, LEARN = "embed", "forward", "head", "backward", "learn"
# Where it is delayed: the gradients of layers' weights.
WEIGHTS = "weights"
# What stages hand on between these, for profiles.
SEND = "send"
_SCOPE = "pipeline_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """`ticks` in which all stages do `work`: words, or with several stacks of layers `beside.StackWork`."""

    work: frozenset[Any]
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

    @property
    def numbers(self) -> list[Any]:
        """Those that are not the same in all ticks."""
        chunk = [] if isinstance(self.chunk, int) else [jnp.int32(self.chunk)]
        return [jnp.int32(self.microbatch), *chunk]

    def like(self, numbers: Sequence[Any]) -> Unit:
        """Return a unit of such `numbers`."""
        return Unit(numbers[0], numbers[1] if len(numbers) > 1 else self.chunk)


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


def rounds(
    stages: int, microbatches: int, chunks: int = 1, *, learns: bool, delayed: bool = False
) -> list[Rounds]:
    """Return what is done from tick -1 on; `delayed` are the gradients of weights.

    >>> [(one.times, one.ticks, sorted(one.stretches[0].work)) for one in rounds(2, 8, learns=False)]
    [(1, 1, ['embed']), (1, 1, ['embed', 'forward']), (1, 8, ['embed', 'forward', 'head'])]
    """
    full, layers = {EMBED, FORWARD, HEAD}, {FORWARD}
    between, groups = (chunks - 1) * stages, -(-microbatches // stages)
    found = [_once({EMBED}, 1), _once({EMBED, FORWARD}, stages - 1), _once({FORWARD}, between)]
    if not learns:
        return _those(found + _in_groups(full, layers, microbatches, stages, chunks))
    full, layers = full | {BACKWARD}, layers | {BACKWARD}
    back, learn = {BACKWARD}, {LEARN}
    if not delayed:
        found += _in_groups(full | learn, layers, microbatches, stages, chunks)
        found += [_once(back, between), _once(back | learn, stages - 1), _once(learn, 1)]
        return _those(found)
    # While the first microbatches are on their way back, no weights have a gradient yet.
    first = min(stages, microbatches) if chunks == 1 else stages
    late, found = {WEIGHTS}, [*found, _once(full, first)]
    if chunks == 1:
        found += [_once(full | learn | late, microbatches - first), _once(back, stages - first)]
    elif groups > 1:
        found.append(_once(layers | late, between))
        rest = microbatches - stages
        found += _in_groups(full | learn | late, layers | late, rest, stages, chunks)
    found += [_once(back | late, between), _once(back | learn | late, first - 1), _once(learn | late, 1)]
    return _those(found)


def _in_groups(full: set[str], layers: set[str], microbatches: int, stages: int, chunks: int) -> list[Rounds]:
    """Return ticks of all work; where several chunks go round, in groups, with those of layers between."""
    if chunks == 1:
        return [_once(full, microbatches)]
    groups = -(-microbatches // stages)
    both = _once(full, stages).stretches + _once(layers, (chunks - 1) * stages).stretches
    return [Rounds(stretches=both, times=groups - 1), _once(full, stages)]


def _those(found: list[Rounds]) -> list[Rounds]:
    """Return those in which there is something to do."""
    return [one for one in found if one.ticks and one.times]


def _once(work: set[str], ticks: int) -> Rounds:
    return Rounds(stretches=(Stretch(work=frozenset(work), ticks=ticks),))


def sharing(rows: int, stages: int) -> int:
    """Return how many stages share out so many rows of a microbatch.

    >>> sharing(8, 4), sharing(6, 4), sharing(3, 4)
    (4, 2, 1)
    """
    return math.gcd(rows, stages)


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


def weights_at(tick: Any, stages: int, chunks: int = 1) -> Unit:
    """Return of what all stages take the gradients of weights, where these are delayed."""
    return backward_at(tick - 1, 0, stages, chunks)


def unit_at(work: str, tick: Any, stage: Any, stages: int, chunks: int = 1) -> Unit:
    """Return what a stage takes in layers' `work`."""
    if work == WEIGHTS:
        return weights_at(tick, stages, chunks)
    return (forward_at if work == FORWARD else backward_at)(tick, stage, stages, chunks)


def weights_since(stage: Any) -> Any:
    """Return how long ago a stage took back what it takes the gradients of weights of now."""
    return stage + 1


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
