"""A corpus as one memory-mapped array of tokens, made once and kept in a cache."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from ...sharding import files
from ...sharding.errors import UserError
from . import cache
from .chunk import Chunk, text_chunks
from .config import DataConfig
from .documents import pieces
from .sources import Source, find, refuse_dead_settings
from .token_files import token_chunks
from .tokenizer import Tokenizer, load_tokenizer

_VERSION = 1
# Sources up to this size are recognised by their contents, larger ones by size, time and both ends.
_HASHED_BYTES = 1 << 28
_ENDS_BYTES = 1 << 16
_REPORT_SECONDS = 5.0

Report = Callable[[str], None]


def to_stderr(message: str) -> None:
    """Print one line of progress where it does not mix with results."""
    print(message, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """The documents of a source, tokenised, one after the other.

    `tokens` `[tokens]` is memory-mapped, uint16 or uint32; `ends` `[documents]` is one past each document's
    last token and `keys` `[documents]` are their 64-bit keys. `fingerprint` depends on tokens and documents
    alone, so that it tells two hosts, or a run and its resumption, whether they read the same corpus.
    `skipped` counts what was left out, by reason. `tokenizer` is None for token arrays that came without one.
    """

    source: str
    tokens: np.ndarray
    ends: np.ndarray
    keys: np.ndarray
    tokenizer: Tokenizer | None
    max_token: int
    skipped: dict[str, int]
    fingerprint: str
    folder: pathlib.Path

    def check_vocab(self, vocab_size: int) -> None:
        """Raise UserError unless a model with `vocab_size` embeddings has one for every id that occurs."""
        if self.max_token >= vocab_size:
            wanted = self.max_token + 1
            if self.tokenizer is not None:
                wanted = max(wanted, self.tokenizer.vocab_size)
            raise UserError(
                f"data.source={self.source!r} holds token ids up to {self.max_token} and the model's vocab "
                f"is {vocab_size}; the nearest that fits is {wanted}"
            )


def open_corpus(config: DataConfig, report: Report = to_stderr) -> Corpus:
    """Return the corpus of `config`, tokenised now unless the cache has it.

    Many processes may do this at once: one on each machine tokenises, and an entry of the cache is complete
    or not there. One that was damaged is made again. Raises UserError for whatever is wrong with the sources.
    """
    found, tokenizer, final = _located(config)
    with cache.blaming(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
    if not final.exists() or cache.unsound(final) is not None:
        with cache.blaming(final.parent), files.locked(final):
            _make(config, found, tokenizer, final, report)
    meta = cache.read_meta(final)
    return Corpus(
        source=config.source,
        tokens=_mapped(final / "tokens.bin", meta["dtype"]),
        ends=_mapped(final / "ends.bin", "<i8"),
        keys=_mapped(final / "keys.bin", "<u8"),
        tokenizer=tokenizer,
        max_token=meta["max_token"],
        skipped=meta["skipped"],
        fingerprint=meta["fingerprint"],
        folder=final,
    )


def entry_of(config: DataConfig) -> pathlib.Path:
    """Return the folder of the cache that has the corpus of `config`, or will have it; no text is opened.

    Raises UserError for whatever is wrong with the sources.
    """
    return _located(config)[2]


def _located(config: DataConfig) -> tuple[Source, Tokenizer | None, pathlib.Path]:
    """Return the sources of `config`, their tokenizer and their entry of the cache."""
    found = find(config.source, format=config.format, include=config.include)
    refuse_dead_settings(config, found)
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer, bos_token=config.bos_token, eos_token=config.eos_token)
    root = cache.cache_folder(config.cache)
    return found, tokenizer, root / _entry_name(config, found, tokenizer)


def _mapped(path: pathlib.Path, dtype: str) -> np.ndarray:
    # As a plain array: slices of a memmap cost several times as much.
    return np.asarray(np.memmap(path, dtype, "r"))


def _entry_name(config: DataConfig, found: Source, tokenizer: Tokenizer | None) -> str:
    """Return a name that is another whenever the tokens could be."""
    how = [_VERSION, found.kind, config.text_field, tokenizer.fingerprint if tokenizer else None]
    how += [config.eos_id, config.token_dtype]
    sizes = [file.path.stat().st_size for file in found.files]
    digest = hashlib.blake2b(json.dumps(how).encode(), digest_size=16)
    whole = sum(sizes) <= _HASHED_BYTES
    for file, size in zip(found.files, sizes, strict=True):
        digest.update(json.dumps([file.name, size]).encode())
        try:
            for part in _recognised_by(file.path, size, whole):
                digest.update(part)
        except OSError as error:
            raise UserError(f"{file.path} cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def _recognised_by(path: pathlib.Path, size: int, whole: bool) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        if whole:
            yield stream.read()
            return
        yield b"%d" % path.stat().st_mtime_ns
        yield stream.read(_ENDS_BYTES)
        stream.seek(max(0, size - _ENDS_BYTES))
        yield stream.read(_ENDS_BYTES)


def _make(
    config: DataConfig, found: Source, tokenizer: Tokenizer | None, final: pathlib.Path, report: Report
) -> None:
    if final.exists():
        wrong = cache.unsound(final)
        if wrong is None:  # another process made it while this one waited for the lock
            return
        report(f"warning: the cached corpus {final} is damaged ({wrong}); tokenising again")
    # Of two machines that share the cache, each may make it.
    with files.whole_folder(final, keep=lambda there: cache.unsound(there) is None) as folder:
        _build(config, found, tokenizer, folder, report)


def _build(
    config: DataConfig, found: Source, tokenizer: Tokenizer | None, folder: pathlib.Path, report: Report
) -> None:
    began = time.monotonic()
    skipped: Counter[str] = Counter()

    def skip(reason: str) -> None:
        skipped[reason] += 1

    if found.kind == "tokens":
        eos_id = config.eos_id if config.eos_id is not None or tokenizer is None else tokenizer.eos_id
        vocab_size = tokenizer.vocab_size if tokenizer else None
        chunks = token_chunks(found, eos_id=eos_id, bin_dtype=config.token_dtype, vocab_size=vocab_size)
    else:
        assert tokenizer is not None
        vocab_size = tokenizer.vocab_size
        chunks = text_chunks(pieces(found, config.text_field, skip), tokenizer)
    dtype = "<u2" if vocab_size is not None and vocab_size <= 1 << 16 else "<u4"
    writer = _Writer(folder, dtype)
    with writer:
        for chunk in _reporting(chunks, writer, config.source, report):
            writer.write(chunk)
    left_out = "".join(f"; {count} skipped: {reason}" for reason, count in sorted(skipped.items()))
    if not writer.documents:
        held = "tokens" if found.kind == "tokens" else "text"
        files = "its one file" if len(found.files) == 1 else f"its {len(found.files)} files"
        raise UserError(f"data.source={config.source!r} holds no {held} in {files}{left_out}")
    seconds = time.monotonic() - began
    report(
        f"tokenised {config.source}: {writer.documents:,} document{'s'[: writer.documents != 1]}, "
        f"{writer.tokens:,} tokens "
        f"in {seconds:.1f} s{left_out}"
    )
    cache.seal(folder, {**writer.summary(), "skipped": dict(skipped), "source": config.source})


def _reporting(chunks: Iterator[Chunk], writer: _Writer, source: str, report: Report) -> Iterator[Chunk]:
    began = told = time.monotonic()
    for chunk in chunks:
        yield chunk
        now = time.monotonic()
        if now - told > _REPORT_SECONDS:
            rate = writer.tokens / (now - began)
            report(f"tokenising {source}: {writer.tokens:,} tokens so far, {rate / 1e6:.1f} M/s")
            told = now


class _Writer:
    """Appends chunks to the three files of an entry, keeping a digest and the greatest id."""

    def __init__(self, folder: pathlib.Path, dtype: str) -> None:
        self._folder = folder
        self._dtype = np.dtype(dtype)
        self._digest = hashlib.blake2b(digest_size=16)
        self._files: list[BinaryIO] = []
        self._opened = contextlib.ExitStack()
        self.tokens = 0
        self.documents = 0
        self.max_token = 0

    def __enter__(self) -> _Writer:
        with contextlib.ExitStack() as opened:
            names = ("tokens.bin", "ends.bin", "keys.bin")
            self._files = [opened.enter_context(open(self._folder / name, "wb")) for name in names]
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def write(self, chunk: Chunk) -> None:
        """Append `chunk`."""
        if not len(chunk.tokens):
            return
        arrays = (
            chunk.tokens.astype(self._dtype, copy=False),
            (chunk.ends + self.tokens).astype("<i8", copy=False),
            chunk.keys.astype("<u8", copy=False),
        )
        for file, array in zip(self._files, arrays, strict=True):
            file.write(array.tobytes())
        self._digest.update(arrays[0].astype("<u4", copy=False).tobytes())
        self._digest.update(arrays[1].tobytes())
        self.tokens += len(chunk.tokens)
        self.documents += len(chunk.ends)
        self.max_token = max(self.max_token, int(chunk.tokens.max()))

    def summary(self) -> dict[str, object]:
        """Return what the cache keeps beside the files."""
        return {
            "dtype": self._dtype.str,
            "tokens": self.tokens,
            "documents": self.documents,
            "max_token": self.max_token,
            "fingerprint": self._digest.hexdigest(),
        }
