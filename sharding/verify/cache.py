"""Answers of compilers on disk: the same program, plan, topology and versions are compiled once."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..files import user_cache, whole_folder

T = TypeVar("T")

_FORMAT = 1
_ANSWER, _PROGRAM = "answer.json", "program.hlo.gz"


def folder_of(key: str) -> pathlib.Path:
    """Return where the entry of `key` is kept."""
    return user_cache() / "proofs" / key[:2] / key


def key_of(facts: Mapping[str, Any]) -> str:
    """Return the key of an entry; `facts` are plain values."""
    written = json.dumps({**facts, "format": _FORMAT, "sources": _sources()}, sort_keys=True)
    return hashlib.sha256(written.encode()).hexdigest()[:40]


def load(key: str, read: Callable[[Mapping[str, Any]], T]) -> T | None:
    """Return what `read` makes of the answer under `key`, or None; one that cannot be read is removed."""
    try:
        answer = json.loads((folder_of(key) / _ANSWER).read_text(encoding="utf-8"))
        if answer["format"] == _FORMAT:
            return read(answer)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # damaged: removed below, and compiled again
    drop(key)
    return None


def keep(key: str, answer: Mapping[str, Any], hlo: bytes) -> None:
    """Keep an answer and the compiled program's text, gzipped; all of it appears at once."""
    folder = folder_of(key)
    # A cache that cannot be written costs time and nothing else.
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as part:
            (part / _ANSWER).write_text(json.dumps({**answer, "format": _FORMAT}), encoding="utf-8")
            (part / _PROGRAM).write_bytes(hlo)


def drop(key: str) -> None:
    """Remove the entry of `key`, if there is one."""
    shutil.rmtree(folder_of(key), ignore_errors=True)


@functools.cache
def _sources() -> str:
    """Return a hash of all of `sharding`'s code and facts; a change of any of it voids entries.

    Which of its rooms make a step and read what comes out changes with the imports between them. A list of
    them that lacks one would serve a proof of another program, where compiling again only costs time.
    """
    root = pathlib.Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".toml"):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
