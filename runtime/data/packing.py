"""Documents laid end to end and cut into rows, any row of which can be made by itself."""

from __future__ import annotations

import dataclasses

import numpy as np

KEYS = ("tokens", "targets", "segment_ids", "positions")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Rows of `sequence` tokens cut from documents, made when they are asked for.

    Document *d* is ``tokens[begins[d] : begins[d] + lengths[d]]``. With `packing` the documents make one
    stream, and row *r* is its tokens from ``r * sequence`` on, each with the next one as its target::

        documents     a b c . | d e . | f g h i .           (. ends a document)
        row 0, 1      a b c . d e    | . f g h i .
        targets       b c . - e .    | - g h i . -          (- is -1: not counted)
        segment_ids   1 1 1 1 2 2    | 1 2 2 2 2 2
        positions     0 1 2 3 0 1    | 0 0 1 2 3 4

    Without, each document starts a row of its own. What is missing to a full row is padding: segment 0,
    target -1. Every token that has a next one in its document is counted in exactly one row.
    """

    tokens: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    sequence: int
    packing: bool
    # Where each document starts in the stream of tokens (packing) or among the rows (not packing).
    _starts: np.ndarray = dataclasses.field(init=False, repr=False)
    _counting: np.ndarray = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = self.lengths if self.packing else -(-(self.lengths - 1) // self.sequence)
        object.__setattr__(self, "_starts", np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))
        object.__setattr__(self, "_counting", np.arange(self.sequence, dtype=np.int32))

    def __len__(self) -> int:
        last = int(self._starts[-1])
        return -(-(last - 1) // self.sequence) if self.packing else last

    def fill(self, row: int, batch: dict[str, np.ndarray], place: int) -> None:
        """Write row `row` over the padding at `place` of `batch`, which `empty` made."""
        tokens, targets, segment_ids, positions = (batch[key][place] for key in KEYS)
        at = 0
        for segment, (begin, count) in enumerate(self._parts(row), 1):
            # A row's stream has one token more than the row: the target of its last.
            kept = min(at + count, self.sequence) - at
            tokens[at : at + kept] = self.tokens[begin : begin + kept]
            targets[at : at + count - 1] = self.tokens[begin + 1 : begin + count]
            segment_ids[at : at + kept] = segment
            positions[at : at + kept] = self._counting[:kept]
            at += count

    def _parts(self, row: int) -> list[tuple[int, int]]:
        """Return where in `tokens` the row's documents begin and how many tokens it has of each."""
        if not self.packing:
            document = int(np.searchsorted(self._starts, row, "right")) - 1
            low = (row - int(self._starts[document])) * self.sequence
            count = min(self.sequence + 1, int(self.lengths[document]) - low)
            return [(int(self.begins[document]) + low, count)]
        low = row * self.sequence
        high = min(low + self.sequence + 1, int(self._starts[-1]))
        first, last = np.searchsorted(self._starts, [low, high - 1], "right").tolist()
        starts = self._starts[first - 1 : last + 1].tolist()
        begins = self.begins[first - 1 : last].tolist()
        parts = []
        for start, end, begin in zip(starts[:-1], starts[1:], begins, strict=True):
            since = max(start, low)
            parts.append((begin + since - start, min(end, high) - since))
        return parts


def empty(rows: int, sequence: int, pad_id: int) -> dict[str, np.ndarray]:
    """Return a batch that is all padding, int32 `[rows, sequence]` under each of `KEYS`."""
    batch = {key: np.zeros((rows, sequence), np.int32) for key in KEYS}
    batch["tokens"][:] = pad_id
    batch["targets"][:] = -1
    return batch
