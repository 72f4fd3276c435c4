"""Batches of a step: documents laid end to end, cut into rows, as far as this process's devices hold them."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...sharding.errors import UserError, one_line
from .config import DataConfig
from .corpus import Corpus, Report, open_corpus, to_stderr
from .prefetch import Prefetch
from .split import by_tail, spans
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import jax

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """A split of a corpus as numbered global batches.

    A batch is ``tokens``, ``targets``, ``positions`` and, where rows are packed, ``segment_ids``, each int32
    `[global_batch, sequence]`; see `Rows`. Training batches go on for ever, every row once an epoch,
    in an order drawn anew for each epoch; batch *n* depends on the corpus, the config, the seed and *n*,
    never on the hosts or on what was read before. Evaluation batches are `num_batches` fixed ones that the
    seed does not change, the last filled up with padding.
    """

    corpus: Corpus
    config: DataConfig
    split: Literal["train", "eval"]
    global_batch: int
    num_tokens: int
    num_rows: int
    segments: int | None = None
    """The most segments that a row may have, padding counting as one; None where there may be any number."""
    _rows: Rows = dataclasses.field(repr=False)
    # step * global_batch + place in the batch → row, shuffled and repeated by grain in O(1).
    _order: Any = dataclasses.field(repr=False)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None for token arrays that came without one."""
        return self.corpus.tokenizer

    @property
    def fingerprint(self) -> str:
        """Stands for the corpus's tokens and documents: all hosts, and a resumed run, must agree on it."""
        return self.corpus.fingerprint

    @property
    def num_batches(self) -> int:
        """Batches of an epoch; the last is shared with the next epoch (training) or padded (evaluation)."""
        return -(-self.num_rows // self.global_batch)

    def batch(self, step: int) -> Batch:
        """Return the whole global batch of `step` in host memory, int32 `[global_batch, sequence]` each."""
        return self.rows(step, range(self.global_batch))

    def rows(self, step: int, row_indices: Sequence[int]) -> Batch:
        """Return those rows of the batch of `step`, int32 `[len(row_indices), sequence]` each.

        Raises IndexError for a row outside the batch, or an evaluation step from `num_batches` on.
        """
        if step < 0 or (self.split == "eval" and step >= self.num_batches):
            raise IndexError(f"step {step} of {self.num_batches} {self.split} batches")
        batch = empty(len(row_indices), self.config.sequence, _pad_id(self.corpus))
        for place, index in enumerate(row_indices):
            if not 0 <= index < self.global_batch:
                raise IndexError(f"row {index} of global_batch={self.global_batch}")
            at = step * self.global_batch + index
            if self.split == "train" or at < self.num_rows:
                self._rows.fill(int(self._order[at]), batch, place)
        if not self.config.packing:
            # One document a row: what follows it is not counted, and causal attention never sees it.
            del batch["segment_ids"]
        elif self.segments is not None:
            _check_segments(batch["segment_ids"], self.segments, step, row_indices)
        return batch

    @functools.cached_property
    def most_segments(self) -> int:
        """The most segments that any row has, padding counting as one."""
        return self._rows.most_segments() if self.config.packing else 1

    def iterate(
        self,
        start_step: int,
        sharding: jax.sharding.Sharding,
        prefetch: int | None = None,
        stop_step: int | None = None,
    ) -> Prefetch[dict[str, jax.Array]]:
        """Return an iterator of global batches on the devices, from `start_step` up to `stop_step`.

        Each is `jax.Array`s of `sharding`, of which this process makes only the rows that its devices hold.
        Up to `prefetch` batches (the config's where None) are ready ahead of the one in use. Training does
        not end unless `stop_step` is given; evaluation ends after `num_batches`. Close the iterator, or use
        it in a ``with`` block.
        Raises UserError when `sharding` does not divide the batch.
        """
        shape = (self.global_batch, self.config.sequence)
        rows = local_rows(sharding, shape)
        stop = stop_step if stop_step is not None else sys.maxsize
        if self.split == "eval":
            stop = min(stop, self.num_batches)

        def start() -> Iterator[dict[str, jax.Array]]:
            for batch in self._host_batches(start_step, stop, rows):
                yield to_global(batch, rows, sharding, shape)

        return Prefetch(start, depth=self.config.prefetch if prefetch is None else prefetch)

    def _host_batches(self, start: int, stop: int, rows: Sequence[int]) -> Iterator[Batch]:
        import grain

        steps = grain.MapDataset.range(start, max(start, stop)).map(lambda step: self.rows(int(step), rows))
        threads = self.config.read_threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        batches = iter(steps.to_iter_dataset(options))
        try:
            yield from batches
        finally:
            batches.close()


def open_data(
    config: DataConfig,
    seed: int,
    global_batch: int,
    split: Literal["train", "eval"] = "train",
    *,
    corpus: Corpus | None = None,
    report: Report = to_stderr,
) -> Data:
    """Return the batches of a split of `corpus`, which is opened when it is not given.

    `report` gets a line at a time about tokenising and what was skipped. Raises UserError for whatever is
    wrong with the sources, and when the split has too few tokens for a row or too few rows for a batch.
    """
    import grain

    corpus = open_corpus(config, report) if corpus is None else corpus
    evaluation = split == "eval"
    if evaluation and not config.holdout:
        raise UserError(
            "data.holdout=0 leaves nothing to evaluate on; set it above 0, e.g. 0.02, or evaluate_every=0"
        )
    begins, lengths = spans(corpus.ends, corpus.keys, holdout=config.holdout, evaluation=evaluation)
    if config.shuffle:
        shuffled = _permutation(len(begins), 0 if evaluation else seed)
        begins, lengths = begins[shuffled], lengths[shuffled]
    _check_tokens(config, corpus, split, int(lengths.sum()))
    rows = Rows(
        tokens=corpus.tokens,
        begins=begins,
        lengths=lengths,
        sequence=config.sequence,
        packing=config.packing,
    )
    if not evaluation and len(rows) < global_batch:
        raise UserError(
            f"train.global_batch={global_batch} needs as many rows of sequence={config.sequence}, and the "
            f"training split of {config.source!r} makes {len(rows)}; the nearest that fits is "
            f"global_batch={len(rows)}"
        )
    order = grain.MapDataset.range(len(rows))
    if config.shuffle:
        order = order.shuffle(seed=_seed32(0 if evaluation else seed))
    return Data(
        corpus=corpus,
        config=config,
        split=split,
        global_batch=global_batch,
        num_tokens=int(lengths.sum()),
        num_rows=len(rows),
        _rows=rows,
        _order=order.repeat(),
    )


def local_rows(sharding: jax.sharding.Sharding, shape: tuple[int, int]) -> list[int]:
    """Return, in order, the rows of a batch of `shape` that this process's devices hold some of.

    Raises UserError when `sharding` does not divide `shape`.
    """
    try:
        indices = sharding.addressable_devices_indices_map(shape)
    except ValueError as error:
        raise UserError(
            f"a batch of train.global_batch={shape[0]} rows of data.sequence={shape[1]} does not divide over "
            f"{sharding}: {one_line(error)}"
        ) from None
    return sorted({row for index in indices.values() if index for row in range(*index[0].indices(shape[0]))})


def to_global(
    batch: Batch, rows: Sequence[int], sharding: jax.sharding.Sharding, shape: tuple[int, int]
) -> dict[str, jax.Array]:
    """Return `batch`, the rows `rows` of a global one of `shape`, as arrays of `shape` and `sharding`."""
    import jax

    place = {row: at for at, row in enumerate(rows)}

    def put(values: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            low, high, _ = index[0].indices(shape[0]) if index else (0, shape[0], 1)
            begin = place[low]
            return values[begin : begin + high - low, index[1] if index else slice(None)]

        return jax.make_array_from_callback(shape, sharding, part)

    return {key: put(values) for key, values in batch.items()}


def _pad_id(corpus: Corpus) -> int:
    return 0 if corpus.tokenizer is None else corpus.tokenizer.pad_id


def _permutation(count: int, seed: int) -> np.ndarray:
    # NumPy promises that RandomState's streams never change, so a run resumes in the same order years later.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed))).permutation(count)


def _seed32(seed: int) -> int:
    """Spread a seed over grain's 32 bits: it adds the epoch, and seeds 0 and 1 would share epochs."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _check_tokens(config: DataConfig, corpus: Corpus, split: str, num_tokens: int) -> None:
    name = {"train": "training", "eval": "held-out"}[split]
    if num_tokens < 2:
        how = (
            "the end of every document" if by_tail(len(corpus.ends), config.holdout) else "documents by hash"
        )
        raise UserError(
            f"holdout={config.holdout} ({how}) leaves the {name} split of {config.source!r} "
            f"({len(corpus.tokens):,} tokens in {len(corpus.ends):,} documents) without text; "
            "give more text or another data.holdout"
        )
    if config.packing and split == "train" and num_tokens <= config.sequence:
        raise UserError(
            f"data.sequence={config.sequence} is longer than the {num_tokens:,} tokens of the training split "
            f"of {config.source!r}; the longest that fits is {num_tokens - 1}"
        )


KEYS = ("tokens", "targets", "segment_ids", "positions")


def keys_of(config: DataConfig) -> tuple[str, ...]:
    """Return the arrays of a batch: rows that are not packed have no segments to be told apart."""
    return KEYS if config.packing else tuple(key for key in KEYS if key != "segment_ids")


def _check_segments(ids: np.ndarray, most: int, step: int, rows: Sequence[int]) -> None:
    """Raise UserError for a row of more than `most` segments, which attention would pass over."""
    found = ids.max(axis=1) + (ids[:, -1] == 0)
    if found.size and found.max() > most:
        row = int(found.argmax())
        raise UserError(
            f"row {rows[row]} of batch {step} has {found[row]} segments, and the plan's attention takes "
            f"{most}; plan again with data.segments={found[row]}, or attention=cudnn"
        )


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

    def most_segments(self) -> int:
        """Return the most documents that a packed row has tokens of, its padding counting as one more."""
        total = int(self._starts[-1])
        most = 0
        # A million rows at a time, so that little memory is taken.
        for first in range(0, len(self), 1 << 20):
            low = np.arange(first, min(first + (1 << 20), len(self)), dtype=np.int64) * self.sequence
            high = np.minimum(low + self.sequence, total)
            documents = np.searchsorted(self._starts, high - 1, "right") - np.searchsorted(
                self._starts, low, "right"
            )
            padded = high - low < self.sequence
            most = max(most, int((documents + 1 + padded).max()))
        return most

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
