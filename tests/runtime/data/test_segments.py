"""Segments of packed rows: counted as rows are laid, kept with the tokens, held to a plan's in each batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from meshwright.runtime.data import open_data
from meshwright.runtime.data.segments import counted, known
from meshwright.sharding.errors import UserError


def runs(ids: np.ndarray) -> int:
    return int((np.diff(ids, axis=1) != 0).sum(axis=1).max()) + 1


@pytest.mark.parametrize("sequence", [8, 64, 1000])
@pytest.mark.parametrize("seed", [0, 5])
def test_the_most_are_counted_as_rows_are_laid(config, texts, sequence: int, seed: int) -> None:
    data = open_data(config(texts, sequence=sequence), seed=seed, global_batch=1)
    by_rows = max(runs(data.batch(step)["segment_ids"]) for step in range(data.num_rows))
    assert data.most_segments == by_rows
    assert by_rows > 1


def test_what_was_counted_is_known_before_the_text_is_opened_again(config, texts) -> None:
    settings = config(texts, sequence=1000)
    assert known(settings, 0) is None
    data = open_data(settings, seed=0, global_batch=1)
    most = counted(data, 0)
    up = known(settings, 0)
    assert up is not None
    assert most <= up < 2 * most
    assert known(settings, 1) is None
    assert known(config(texts, sequence=64), 0) is None
    assert known(config(texts, sequence=64, segments=7), 0) == 7
    (texts / "41.txt").write_text("one more")
    assert known(settings, 0) is None


def test_a_row_with_more_is_an_error_and_never_cut(config, texts) -> None:
    data = open_data(config(texts, sequence=1000), seed=0, global_batch=2)
    most = data.most_segments
    assert len(dataclasses.replace(data, segments=most).batch(0)["segment_ids"]) == 2
    held = dataclasses.replace(data, segments=most - 1)
    full = next(
        step for step in range(len(data.corpus.ends)) if runs(data.batch(step)["segment_ids"]) == most
    )
    with pytest.raises(UserError, match=rf"has {most} segments, and .* takes {most - 1}; .*segments={most}"):
        held.batch(full)


def test_rows_of_one_document_have_no_segments_to_pay_for(config, texts) -> None:
    data = open_data(config(texts, packing=False), seed=0, global_batch=4)
    assert set(data.batch(0)) == {"tokens", "targets", "positions"}
    assert data.most_segments == 1
