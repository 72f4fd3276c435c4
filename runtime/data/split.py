"""Which documents, or which part of each, are held out for evaluation."""

from __future__ import annotations

import numpy as np

# With fewer held-out documents than this, the loss on them says little about the rest.
_FEWEST = 8


def spans(
    ends: np.ndarray, keys: np.ndarray, *, holdout: float, evaluation: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return where a split's documents begin and how long they are, int64 `[documents]`, in corpus order.

    A document is held out by its key alone, whatever else is in the corpus. Where that would be fewer
    than 8 documents (one long file, say), the last `holdout` of each document is held out instead.
    Documents of one token have nothing to predict and are left out.
    """
    ends = np.asarray(ends, np.int64)
    begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    lengths = ends - begins
    if by_tail(len(ends), holdout):
        kept = np.ceil(lengths * (1 - holdout)).astype(np.int64)
        begins, lengths = (begins + kept, lengths - kept) if evaluation else (begins, kept)
        chosen = lengths > 1
    else:
        chosen = ((np.asarray(keys) < np.uint64(holdout * 2.0**64)) == evaluation) & (lengths > 1)
    return begins[chosen], lengths[chosen]


def by_tail(documents: int, holdout: float) -> bool:
    """Whether the end of every document is held out, rather than whole documents."""
    return documents * holdout < _FEWEST
