"""The folder that keeps tokenised corpora; an entry is sealed with checksums, held against it when opened."""

from __future__ import annotations

import contextlib
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from ...sharding.errors import UserError
from ...sharding.files import expanded, user_cache

_META = "meta.json"
_BLOCK_BYTES = 1 << 20
_BLOCKS = 64


def cache_folder(folder: str | None) -> pathlib.Path:
    """Return the folder for tokenised corpora: `folder`, or the user's cache folder's part of meshwright."""
    if folder is not None:
        return expanded(folder)
    return user_cache() / "data"


@contextlib.contextmanager
def blaming(folder: pathlib.Path) -> Iterator[None]:
    """Turn a failed write under the cache into a UserError that says which setting moves it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be written ({error.strerror or error}); "
            "set data.cache to another folder"
        ) from None


def seal(folder: pathlib.Path, meta: dict[str, Any]) -> None:
    """Write `meta`, with the size and checksum of every file in `folder` added to it."""
    files = {path.name: [path.stat().st_size, _checksum(path)] for path in sorted(folder.iterdir())}
    (folder / _META).write_text(json.dumps({**meta, "files": files}, indent=1), encoding="utf-8")


def unsound(final: pathlib.Path) -> str | None:
    """Return what is wrong with the entry at `final`, or None."""
    try:
        meta = read_meta(final)
        for name, (size, checksum) in meta["files"].items():
            path = final / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _checksum(path) != checksum:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_META} does not read ({error})"
    return None


def read_meta(final: pathlib.Path) -> dict[str, Any]:
    """Return what `seal` wrote."""
    return json.loads((final / _META).read_text(encoding="utf-8"))


def _checksum(path: pathlib.Path) -> int:
    """CRC-32 of up to 64 blocks of 1 MiB spread evenly over a file: the whole of one up to 64 MiB."""
    size = path.stat().st_size
    blocks = -(-size // _BLOCK_BYTES)
    chosen = (
        range(blocks) if blocks <= _BLOCKS else [i * (blocks - 1) // (_BLOCKS - 1) for i in range(_BLOCKS)]
    )
    total = 0
    with open(path, "rb") as stream:
        for block in chosen:
            stream.seek(block * _BLOCK_BYTES)
            total = zlib.crc32(stream.read(_BLOCK_BYTES), total)
    return total
