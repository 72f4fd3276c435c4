"""Tokens on their way from the sources to the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from .documents import Piece
from .tokenizer import Tokenizer

# Text handed to the tokenizer at once: enough to keep every core busy, little beside any memory.
_BATCH_CHARACTERS = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Consecutive tokens `[tokens]` of the corpus, and the documents that end in them.

    `ends` `[documents]` counts from the chunk's start, one past a document's last token; `keys`
    `[documents]` are those documents' 64-bit keys. What follows the last end belongs to the first document
    of the next chunk.
    """

    tokens: np.ndarray
    ends: np.ndarray
    keys: np.ndarray


def text_chunks(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Chunk]:
    """Tokenise documents, each begun by the tokenizer's `bos_id` and ended by its `eos_id`."""
    fresh = True
    for batch in _batched(pieces):
        parts: list[np.ndarray] = []
        ends: list[int] = []
        length = 0
        for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
            if fresh and tokenizer.bos_id is not None:
                parts.append(np.array([tokenizer.bos_id], np.uint32))
                length += 1
            parts.append(ids)
            length += len(ids)
            fresh = piece.last
            if piece.last:
                parts.append(np.array([tokenizer.eos_id], np.uint32))
                length += 1
                ends.append(length)
        yield Chunk(
            tokens=np.concatenate(parts),
            ends=np.array(ends, np.int64),
            keys=np.array([piece.key for piece in batch if piece.last], np.uint64),
        )


def _batched(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
