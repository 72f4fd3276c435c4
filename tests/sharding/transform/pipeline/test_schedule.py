"""Ticks: every chunk of every microbatch once each way, after what it waits for, from the input kept."""

import pytest
from meshwright.sharding.transform.pipeline.schedule import (
    BACKWARD,
    FORWARD,
    HEAD,
    LEARN,
    WEIGHTS,
    backward_at,
    forward_at,
    ring,
    rounds,
    ticks_since,
    weights_at,
    weights_since,
)


def done(
    stages: int, microbatches: int, chunks: int, delayed: bool = False
) -> dict[str, dict[tuple[int, int, int], int]]:
    """Return work → (microbatch, chunk, stage) → the tick in which a stage does it."""
    works = (FORWARD, BACKWARD, HEAD, LEARN, WEIGHTS)
    found: dict[str, dict[tuple[int, int, int], int]] = {work: {} for work in works}

    def put(work: str, tick: int, unit: tuple[int, int], stage: int) -> None:
        if 0 <= unit[0] < microbatches:
            place = (*unit, stage)
            assert place not in found[work]
            found[work][place] = tick

    tick = -1
    for whole in rounds(stages, microbatches, chunks, learns=True, delayed=delayed):
        for one in whole.stretches * whole.times:
            for t in range(tick, tick + one.ticks):
                for stage in range(stages):
                    if FORWARD in one.work:
                        put(FORWARD, t, forward_at(t, stage, stages, chunks), stage)
                    if BACKWARD in one.work:
                        put(BACKWARD, t, backward_at(t, stage, stages, chunks), stage)
                    if WEIGHTS in one.work:
                        put(WEIGHTS, t, weights_at(t, stages, chunks), stage)
                if HEAD in one.work:
                    put(HEAD, t, forward_at(t, stages - 1, stages, chunks), stages - 1)
                if LEARN in one.work:
                    put(LEARN, t, backward_at(t - 1, 0, stages, chunks), 0)
            tick += one.ticks
    return found


SHAPES = ((2, 4, 1), (4, 3, 1), (4, 1, 1), (4, 4, 1), (2, 4, 2), (4, 8, 3), (4, 6, 2), (3, 2, 4), (2, 8, 2))


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize(("stages", "microbatches", "chunks"), SHAPES)
def test_every_chunk_runs_once_each_way_after_what_it_waits_for(stages, microbatches, chunks, delayed):
    found = done(stages, microbatches, chunks, delayed)
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


@pytest.mark.parametrize(("stages", "microbatches", "chunks"), SHAPES)
def test_weights_wait_until_the_first_stage_is_back_and_take_no_tick_more_than_microbatches_do(
    stages, microbatches, chunks
):
    found = done(stages, microbatches, chunks, delayed=True)
    assert found[WEIGHTS].keys() == found[BACKWARD].keys()
    for (m, r, s), tick in found[WEIGHTS].items():
        # Before its place among as many as there are stages is written again, which is after it in a tick.
        assert tick - found[BACKWARD][m, r, s] == weights_since(s) <= stages
    whole = rounds(stages, microbatches, chunks, learns=True, delayed=True)
    stretches = [(one, whole.times) for whole in whole for one in whole.stretches]
    groups = microbatches if chunks == 1 else -(-microbatches // stages) * stages
    for work, ticks in ((WEIGHTS, 0), (BACKWARD, stages - 1), (FORWARD, stages - 1)):
        done_in = sum(one.ticks * times for one, times in stretches if work in one.work)
        assert done_in == groups * chunks + ticks
    assert not done(stages, microbatches, chunks)[WEIGHTS]
