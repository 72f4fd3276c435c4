"""The record beside a checkpoint's arrays: what was saved, and how to tell that it is still all there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import Damaged

NAME = "manifest.json"
FORMAT = 1
# Larger files hold array data, which the leaves' fingerprints cover.
_DIGESTED_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class SavedArray:
    """One array: its name, shape, dtype and fingerprint (16 hexadecimal digits)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class SavedFile:
    """One file, by its path in the checkpoint: its size, and its SHA-256 if it is small."""

    name: str
    size_bytes: int
    sha256: str | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything known of a checkpoint without reading its arrays."""

    step: int
    metadata: Mapping[str, Any]
    metrics: Mapping[str, float]
    versions: Mapping[str, str]
    saved_at: str
    leaves: tuple[SavedArray, ...]
    files: tuple[SavedFile, ...] = field(default=())


def write(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json` and wait until it and the names in `directory` are on the disk."""
    body = {"format": FORMAT, **asdict(manifest)}
    text = json.dumps({**body, "sha256": _digest(_canonical(body))}, indent=1)
    with open(directory / NAME, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(directory)


def read(directory: Path) -> Manifest:
    """Read `manifest.json`; raises `Damaged` when it is missing, cut short or altered."""
    try:
        body = json.loads((directory / NAME).read_bytes())
        claimed = body.pop("sha256")
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"{NAME} cannot be read: {error}") from None
    if claimed != _digest(_canonical(body)):
        raise Damaged(f"{NAME} was altered: its checksum does not fit")
    if body.pop("format") != FORMAT:
        raise Damaged(f"{NAME} is of another format than {FORMAT}, the one this version reads")
    leaves = tuple(SavedArray(**{**leaf, "shape": tuple(leaf["shape"])}) for leaf in body.pop("leaves"))
    return Manifest(
        **{**body, "leaves": leaves, "files": tuple(SavedFile(**file) for file in body.pop("files"))}
    )


def files_of(directory: Path) -> tuple[SavedFile, ...]:
    """List what lies in a finished checkpoint, the manifest excepted."""
    found = []
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path != directory / NAME:
            size = path.stat().st_size
            digest = _digest(path.read_bytes()) if size <= _DIGESTED_BYTES else None
            found.append(
                SavedFile(name=path.relative_to(directory).as_posix(), size_bytes=size, sha256=digest)
            )
    return tuple(found)


def check_files(directory: Path, manifest: Manifest) -> None:
    """Raise `Damaged` naming the first file that is missing, of another size or, if small, altered."""
    for file in manifest.files:
        path = directory / file.name
        try:
            size = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise Damaged(f"file {file.name} is missing") from None
        if size != file.size_bytes:
            raise Damaged(f"file {file.name} has {size:,} bytes where {file.size_bytes:,} were written")
        if file.sha256 is not None and _digest(path.read_bytes()) != file.sha256:
            raise Damaged(f"file {file.name} was altered: its checksum does not fit")


def sync_directory(directory: Path) -> None:
    """Wait until the names in `directory` are on the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
