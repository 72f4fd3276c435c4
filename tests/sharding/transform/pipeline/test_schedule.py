"""Ticks: every chunk of every microbatch once each way, after what it waits for, from the input kept."""

import pytest
from meshwright.sharding.transform.pipeline.schedule import (
    BACKWARD,
    FORWARD,
    HEAD,
    LEARN,
    backward_at,
    forward_at,
    ring,
    rounds,
    ticks_since,
)


def done(stages: int, microbatches: int, chunks: int) -> dict[str, dict[tuple[int, int, int], int]]:
    """Return work → (microbatch, chunk, stage) → the tick in which a stage does it."""
    found: dict[str, dict[tuple[int, int, int], int]] = {FORWARD: {}, BACKWARD: {}, HEAD: {}, LEARN: {}}

    def put(work: str, tick: int, unit: tuple[int, int], stage: int) -> None:
        if 0 <= unit[0] < microbatches:
            place = (*unit, stage)
            assert place not in found[work]
            found[work][place] = tick

    tick = -1
    for whole in rounds(stages, microbatches, chunks, learns=True):
        for one in whole.stretches * whole.times:
            for t in range(tick, tick + one.ticks):
                for stage in range(stages):
                    if FORWARD in one.work:
                        put(FORWARD, t, forward_at(t, stage, stages, chunks), stage)
                    if BACKWARD in one.work:
                        put(BACKWARD, t, backward_at(t, stage, stages, chunks), stage)
                if HEAD in one.work:
                    put(HEAD, t, forward_at(t, stages - 1, stages, chunks), stages - 1)
                if LEARN in one.work:
                    put(LEARN, t, backward_at(t - 1, 0, stages, chunks), 0)
            tick += one.ticks
    return found


@pytest.mark.parametrize(
    ("stages", "microbatches", "chunks"), [(2, 4, 1), (4, 3, 1), (2, 4, 2), (4, 8, 3), (4, 6, 2), (3, 2, 4)]
)
def test_every_chunk_runs_once_each_way_after_what_it_waits_for(stages, microbatches, chunks):
    found = done(stages, microbatches, chunks)
    forward, backward = found[FORWARD], found[BACKWARD]
    every = {(m, r, s) for m in range(microbatches) for r in range(chunks) for s in range(stages)}
    assert forward.keys() == backward.keys() == every
    for m, r, s in every:
        before = (m, r, s - 1) if s else (m, r - 1, stages - 1)
        # Handed on from tick to tick, so that nothing but the newest is held.
        if before in forward:
            assert forward[before] == forward[m, r, s] - 1
            assert backward[before] == backward[m, r, s] + 1
        since = backward[m, r, s] - forward[m, r, s]
        kept = ticks_since(backward_at(backward[m, r, s], s, stages, chunks), s, stages, chunks)
        assert since == kept < ring(stages, chunks)
    last = (chunks - 1, stages - 1)
    for m in range(microbatches):
        assert found[HEAD][m, *last] == forward[m, *last] == backward[m, *last]
        assert found[LEARN][m, 0, 0] == backward[m, 0, 0] + 1
