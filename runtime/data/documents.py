"""Reads documents out of text, JSONL and Parquet files without holding a file whole."""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...sharding.errors import UserError, nearest, one_line
from .sources import Source, SourceFile

# A text file is tokenised this much at a time, cut at a line's end.
PIECE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Some text of the document with this `key`, which decides its split; `last` ends the document."""

    key: int
    text: str
    last: bool


def pieces(found: Source, text_field: str, skip: Callable[[str], None]) -> Iterator[Piece]:
    """Yield the documents of `found` in order; `skip` is told why one was left out.

    A text file is one document, known by its name; a JSONL line or Parquet row is one, known by its
    text, so that equal texts never stand on both sides of the held-out split. Empty ones are left out.
    """
    for file in found.files:
        try:
            if found.kind == "text":
                yield from _text(file, found.lone, skip)
            elif found.kind == "jsonl":
                yield from _jsonl(file.path, text_field)
            else:
                yield from _parquet(file.path, text_field, skip)
        except OSError as error:
            raise UserError(f"{file.path} cannot be read: {error.strerror or error}") from None


def key_of(identity: str | bytes) -> int:
    """Return the 64-bit hash that stands for a document.

    >>> key_of("a") == key_of(b"a")
    True
    """
    raw = identity.encode("utf-8", "surrogatepass") if isinstance(identity, str) else identity
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def _text(file: SourceFile, lone: bool, skip: Callable[[str], None]) -> Iterator[Piece]:
    # All of it is decoded before any is used: half a document is worse than none.
    bad = _first_bad_byte(file.path)
    if bad is not None:
        if lone:
            raise UserError(f"{file.path} is not UTF-8 text: byte {bad} does not decode; convert it first")
        skip("not UTF-8")
        return
    key = key_of(file.name)
    held = ""
    for text in filter(None, _lines(file.path)):
        if held:
            yield Piece(key=key, text=held, last=False)
        held = text
    if held:
        yield Piece(key=key, text=held, last=True)


def _first_bad_byte(path: pathlib.Path) -> int | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    seen = 0
    with open(path, "rb") as stream:
        while True:
            block = stream.read(PIECE_BYTES)
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return seen - held + error.start
            if not block:
                return None
            seen += len(block)


def _lines(path: pathlib.Path) -> Iterator[str]:
    """Yield the text of a file in parts of about `PIECE_BYTES`, each the end of a line where it has lines."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    held = ""
    with open(path, "rb") as stream:
        while block := stream.read(PIECE_BYTES):
            held += decoder.decode(block)
            cut = held.rfind("\n") + 1 or len(held)
            yield held[:cut]
            held = held[cut:]
    yield held


def _jsonl(path: pathlib.Path, text_field: str) -> Iterator[Piece]:
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number} is not JSON: {error}") from None
            text = _field(record, text_field, f"{path}:{number}")
            if text:
                yield Piece(key=key_of(text), text=text, last=True)


def _field(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{where} holds {type(record).__name__}, not an object with the key {text_field!r}")
    if text_field not in record:
        raise UserError(
            f"{where} has no key {text_field!r}; set data.text_field: {_keys(text_field, list(record))}"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(
            f"{where}: {text_field!r} is {type(text).__name__}, not text; set data.text_field to another key"
        )
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate escape is no text


def _keys(wanted: str, names: Sequence[str]) -> str:
    near = nearest(wanted, names)
    return near if near.startswith("known") else f"{near} (known: {', '.join(names[:12])})"


def _parquet(path: pathlib.Path, text_field: str, skip: Callable[[str], None]) -> Iterator[Piece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'{path} needs the package pyarrow; pip install "meshwright[parquet]"') from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {one_line(error)}") from None
    with table:
        names = table.schema_arrow.names
        if text_field not in names:
            raise UserError(
                f"{path} has no column {text_field!r}; set data.text_field: {_keys(text_field, names)}"
            )
        kind = table.schema_arrow.field(text_field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise UserError(
                f"{path}: column {text_field!r} holds {kind}, not text; set data.text_field to another"
            )
        for rows in table.iter_batches(batch_size=1024, columns=[text_field]):
            for text in rows.column(0).to_pylist():
                if text is None:
                    skip("null text")
                elif text:
                    yield Piece(key=key_of(text), text=text, last=True)
