"""Rows against ones laid out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from meshwright.runtime.data import open_data

# Three documents that 0 ends, as in the picture of Rows.
STREAM = [1, 2, 3, 0, 4, 5, 0, 6, 7, 8, 9, 0]


@pytest.fixture
def by_hand(config, tmp_path):
    np.save(tmp_path / "ids.npy", np.array(STREAM, np.uint16))

    def open_rows(sequence: int, **changes):
        settings = config(
            tmp_path / "ids.npy",
            tokenizer=None,
            eos_id=0,
            holdout=0,
            shuffle=False,
            sequence=sequence,
            **changes,
        )
        return open_data(settings, seed=0, global_batch=1)

    return open_rows


def rows_of(data) -> dict[str, list[list[int]]]:
    rows = [data.batch(step) for step in range(data.num_rows)]
    return {key: [row[key][0].tolist() for row in rows] for key in rows[0]}


def test_packed_rows(by_hand) -> None:
    data = by_hand(6)
    assert rows_of(data) == {
        "tokens": [[1, 2, 3, 0, 4, 5], [0, 6, 7, 8, 9, 0]],
        "targets": [[2, 3, 0, -1, 5, 0], [-1, 7, 8, 9, 0, -1]],
        "segment_ids": [[1, 1, 1, 1, 2, 2], [1, 2, 2, 2, 2, 2]],
        "positions": [[0, 1, 2, 3, 0, 1], [0, 0, 1, 2, 3, 4]],
    }
    assert all(values.dtype == np.int32 for values in data.batch(0).values())


def test_the_last_packed_row_is_padded(by_hand) -> None:
    rows = rows_of(by_hand(8))
    assert rows["tokens"][1] == [7, 8, 9, 0, 0, 0, 0, 0]
    assert rows["targets"][1] == [8, 9, 0, -1, -1, -1, -1, -1]
    assert rows["segment_ids"][1] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert rows["positions"][1] == [0, 1, 2, 3, 0, 0, 0, 0]


def test_without_packing_each_document_starts_a_row(by_hand) -> None:
    assert rows_of(by_hand(3, packing=False)) == {
        "tokens": [[1, 2, 3], [4, 5, 0], [6, 7, 8], [9, 0, 0]],
        "targets": [[2, 3, 0], [5, 0, -1], [7, 8, 9], [0, -1, -1]],
        "positions": [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 0]],
    }


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("sequence", range(1, 12))
def test_every_next_token_is_counted_exactly_once(by_hand, sequence: int, packing: bool) -> None:
    rows = rows_of(by_hand(sequence, packing=packing))
    pairs = [
        (token, target)
        for tokens, targets in zip(rows["tokens"], rows["targets"], strict=True)
        for token, target in zip(tokens, targets, strict=True)
        if target >= 0
    ]
    within = [(a, b) for a, b in itertools.pairwise(STREAM) if a != 0]
    assert sorted(pairs) == sorted(within)
