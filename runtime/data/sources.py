"""Files that a `source` names, in an order that is the same everywhere, and the settings that suit them."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import glob
import os
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Literal

from ...sharding.errors import UserError, nearest
from ...sharding.files import expanded
from .config import DataConfig

Kind = Literal["text", "jsonl", "parquet", "tokens"]

_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".npy": "tokens",
    ".bin": "tokens",
}
# Packages that were installed beside the library are not part of it.
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file, and the name it goes by: its path under the source's folder, with `/`."""

    path: pathlib.Path
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a source, in order. `lone` when the user named this one file."""

    kind: Kind
    files: tuple[SourceFile, ...]
    lone: bool


def find(source: str, *, format: Kind | Literal["auto"] = "auto", include: str | None = None) -> Source:
    """Return the files that `source` names; see `DataConfig` for what it may be.

    Raises UserError when there are none, saying what is there instead.
    """
    if source == "stdlib":
        if format not in ("auto", "text"):
            raise UserError(
                f"data.format={format} does not fit source=stdlib, which is text; leave it at auto"
            )
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        files = [file for file in _walk(root, _NOT_LIBRARY) if _matches(file.name, include or "*.py")]
        if not files:
            raise UserError(f"no file of Python's own library under {root} matches {include or '*.py'!r}")
        return Source(kind="text", files=tuple(files), lone=False)
    path = expanded(source)
    if path.is_dir():
        files = _in_folder(path, format, include)
    elif path.is_file():
        files = [SourceFile(path=path, name=path.name)]
    elif glob.has_magic(source):
        files = _globbed(str(path))
    else:
        raise UserError(f"data.source={source!r} is not there: {no_such_file(path)}")
    if include is not None and not path.is_dir():
        raise UserError(
            f"data.include={include!r} has no effect: source={source!r} is not a folder; leave it out"
        )
    return Source(kind=_kind(source, files, format), files=tuple(files), lone=path.is_file())


def no_such_file(path: pathlib.Path) -> str:
    """Return a clause that says how far along `path` the files go, and the nearest name there.

    >>> no_such_file(pathlib.Path("/nowhere/at/all"))[:23]
    "there is no 'nowhere' i"
    """
    missing = path
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    try:
        there = sorted(entry.name for entry in missing.parent.iterdir())
    except OSError as error:
        return f"{missing.parent} cannot be read ({error.strerror})"
    return f"there is no {missing.name!r} in {missing.parent.absolute()}; {nearest(missing.name, there)}"


def _in_folder(root: pathlib.Path, format: str, include: str | None) -> list[SourceFile]:
    everything = list(_walk(root, {"__pycache__"}))
    files = everything
    if include is not None:
        files = [file for file in everything if _matches(file.name, include)]
    elif format in ("jsonl", "parquet", "tokens"):
        files = [file for file in everything if _KINDS.get(file.path.suffix.lower()) == format]
    if not files:
        wanted = f"matches {include!r}" if include is not None else f"is {format}"
        suffixes = collections.Counter(file.path.suffix or "(no suffix)" for file in everything).most_common(
            5
        )
        there = ", ".join(f"{count} {suffix}" for suffix, count in suffixes)
        if not everything:
            raise UserError(f"folder {root} is empty; data.source needs a folder with files in it")
        raise UserError(f"no file in folder {root} {wanted}; it holds {there}")
    return files


def _walk(root: pathlib.Path, without: set[str]) -> Iterator[SourceFile]:
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in without and not name.startswith(".")]
        names += [os.path.join(folder, name) for name in files if not name.startswith(".")]
    named = [
        (pathlib.PurePath(os.path.relpath(path, root)).as_posix(), path)
        for path in names
        if os.path.isfile(path)
    ]
    for name, path in sorted(named):
        yield SourceFile(path=pathlib.Path(path), name=name)


def _matches(name: str, include: str) -> bool:
    return fnmatch.fnmatchcase(name if "/" in include else name.rpartition("/")[2], include)


def _globbed(pattern: str) -> list[SourceFile]:
    paths = [pathlib.Path(path) for path in glob.glob(pattern, recursive=True)]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        parent = pathlib.Path(pattern).parent
        there = sorted(p.name for p in parent.iterdir()) if parent.is_dir() else []
        shown = (
            f"{parent} holds {', '.join(there[:8]) or 'nothing'}"
            if parent.is_dir()
            else f"there is no folder {parent}"
        )
        raise UserError(f"data.source={pattern!r} matches no file; {shown}")
    common = os.path.commonpath([path.parent for path in paths])
    return sorted(
        (
            SourceFile(path=path, name=pathlib.PurePath(os.path.relpath(path, common)).as_posix())
            for path in paths
        ),
        key=lambda file: file.name,
    )


def _kind(source: str, files: Sequence[SourceFile], format: Kind | Literal["auto"]) -> Kind:
    found: list[Kind] = [_KINDS.get(file.path.suffix.lower(), "text") for file in files]
    kinds = collections.Counter(found)
    if format == "auto":
        if len(kinds) > 1:
            there = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            raise UserError(
                f"data.source={source!r} mixes kinds ({there}); choose with data.format or data.include"
            )
        return found[0]
    if format == "tokens":
        odd = next((file for file in files if file.path.suffix.lower() not in (".npy", ".bin")), None)
        if odd is not None:
            raise UserError(f"data.format=tokens reads .npy and .bin files; {odd.path} is neither")
    return format


def refuse_dead_settings(config: DataConfig, found: Source) -> None:
    """Raise UserError for a setting that was changed and has no effect on the files of `found`."""
    source = f"{config.source!r} is {found.kind}"
    if found.kind != "tokens":
        if config.tokenizer is None:
            raise UserError(f"data.tokenizer=null leaves text unread and {source}; try tokenizer=bytes")
        _refuse(config, ("eos_id", "token_dtype"), f"is for token arrays and {source}")
    elif all(file.path.suffix.lower() != ".bin" for file in found.files):
        _refuse(config, ("token_dtype",), f"is for .bin files and {config.source!r} has none")
    if found.kind in ("text", "tokens"):
        _refuse(config, ("text_field",), f"is for JSONL and Parquet and {source}")
    if config.tokenizer is None:
        _refuse(config, ("bos_token", "eos_token"), "is for a tokenizer.json and data.tokenizer is null")


def _refuse(config: DataConfig, fields: tuple[str, ...], why: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if value != DataConfig.model_fields[field].default:
            raise UserError(f"data.{field}={value!r} {why}; leave it out")
