"""Reads documents out of .npy and .bin arrays of token ids."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np

from ...sharding.errors import UserError, one_line
from .chunk import Chunk
from .documents import key_of
from .sources import Source

_CHUNK_TOKENS = 1 << 22


def token_chunks(
    found: Source, *, eos_id: int | None, bin_dtype: str, vocab_size: int | None
) -> Iterator[Chunk]:
    """Yield the documents of the arrays of `found`, in order.

    A 1-D array's documents each end with `eos_id`; each row of a 2-D one is a document, and `eos_id`
    divides it further. A document's key is its place in its file. Nothing is added to the ids.
    """
    for file in found.files:
        array = read_array(file.path, bin_dtype)
        if not array.size:
            continue
        key, count = key_of(file.name), 0
        rows = max(1, _CHUNK_TOKENS // (array.shape[1] if array.ndim == 2 else 1))
        for begin in range(0, len(array), rows):
            part = np.ascontiguousarray(array[begin : begin + rows])
            tokens = part.reshape(-1)
            _check_ids(file.path, tokens, vocab_size)
            ended = np.zeros(len(tokens), bool) if eos_id is None else tokens == eos_id
            if part.ndim == 2:
                ended[part.shape[1] - 1 :: part.shape[1]] = True
            if begin + rows >= len(array):
                ended[-1] = True
            ends = np.flatnonzero(ended).astype(np.int64) + 1
            keys = _mix(np.uint64(key) + np.arange(count, count + len(ends), dtype=np.uint64))
            count += len(ends)
            yield Chunk(tokens=tokens, ends=ends, keys=keys)


def read_array(path: pathlib.Path, bin_dtype: str) -> np.ndarray:
    """Map the ids in `path`, `[tokens]` or `[rows, tokens]`, without reading them; nothing pickled is loaded.

    Raises UserError when the file is not an array of integers in one or two dimensions.
    """
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            size, width = path.stat().st_size, np.dtype(bin_dtype).itemsize
            if size % width:
                raise UserError(
                    f"{path} has {size} bytes, which is no whole number of {bin_dtype} ({width} bytes each); "
                    "set data.token_dtype to the type it was written in"
                )
            array = (
                np.memmap(path, np.dtype(bin_dtype).newbyteorder("<"), "r")
                if size
                else np.empty(0, bin_dtype)
            )
    except UserError:
        raise
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is not an array of numbers: {one_line(error)}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise UserError(f"{path} holds {kind}, and token ids are integers; save them as uint16 or uint32")
    if array.ndim not in (1, 2):
        raise UserError(f"{path} has shape {list(array.shape)}; token ids come as [tokens] or [rows, tokens]")
    return array


def _check_ids(path: pathlib.Path, tokens: np.ndarray, vocab_size: int | None) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0:
        raise UserError(f"{path} holds the id {low}; token ids are not negative")
    limit = 2**31 if vocab_size is None else vocab_size
    if high >= limit:
        owner = "int32" if vocab_size is None else "the tokenizer"
        raise UserError(
            f"{path} holds the id {high} and {owner} ends at {limit - 1}; set data.tokenizer to the one "
            "that made the ids, or to null together with data.eos_id"
        )


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread 64-bit integers evenly (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
