"""How many segments packed rows have at most: counted once, and kept with the tokens they were counted in."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib

from ...sharding.errors import UserError
from ...sharding.files import write_whole
from .batches import Data
from .config import DataConfig
from .corpus import entry_of

_FILE = "segments.json"


def counted(data: Data, seed: int) -> int:
    """Return the most segments that a row of `data` has, and keep it for who plans without its tokens."""
    found = data.most_segments
    # It depends on the order of documents, which the seed shuffles.
    key, kept = _key(data.config, seed), _read(data.corpus.folder)
    if data.split == "train" and kept.get(key) != found:
        with contextlib.suppress(OSError):
            write_whole(data.corpus.folder / _FILE, json.dumps({**kept, key: found}))
    return found


def known(config: DataConfig, seed: int) -> int | None:
    """Return the most segments of a row as far as that is known before any text is opened.

    That is what the config says, or what was counted of these sources before, as they are now, `rounded`.
    """
    if config.segments is not None or not config.packing:
        return config.segments
    try:
        folder = entry_of(config)
    except UserError:
        return None
    kept = _read(folder).get(_key(config, seed))
    return None if kept is None else rounded(kept)


def rounded(segments: int) -> int:
    """Return the power of two from `segments` up, so that a few documents more are the same program.

    >>> rounded(2), rounded(33)
    (2, 64)
    """
    return max(2, 1 << (segments - 1).bit_length())


def _key(config: DataConfig, seed: int) -> str:
    how = [config.sequence, config.shuffle, config.holdout, seed if config.shuffle else 0]
    return hashlib.blake2b(json.dumps(how).encode(), digest_size=8).hexdigest()


def _read(folder: pathlib.Path) -> dict[str, int]:
    try:
        return dict(json.loads((folder / _FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
