"""Where two configurations differ, so that a run folder is not continued with another one."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

ABSENT = "(absent)"


class Difference(NamedTuple):
    """One key whose value is not the same: its dotted name, the value saved and the value asked for."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} → {_shown(self.new)}"


def differing_keys(
    old_config: Mapping[str, Any], new_config: Mapping[str, Any], ignore: Iterable[str] = ()
) -> list[Difference]:
    """List the dotted keys whose values differ, in the order of the old config, then new keys.

    Lists and tuples are the same (JSON knows only one of them). `ignore` holds dotted keys or patterns;
    a key also covers everything below it: ``train`` covers ``train.steps``.

    >>> differing_keys({"model": {"layers": 2}}, {"model": {"layers": 4}})
    [Difference(key='model.layers', old=2, new=4)]
    """
    patterns = tuple(ignore)
    return [
        difference
        for difference in _walk("", old_config, new_config)
        if not any(_covers(pattern, difference.key) for pattern in patterns)
    ]


def _covers(pattern: str, key: str) -> bool:
    return fnmatch.fnmatchcase(key, pattern) or fnmatch.fnmatchcase(key, f"{pattern}.*")


def _walk(prefix: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    found: list[Difference] = []
    for key in dict.fromkeys([*old, *new]):
        name = f"{prefix}.{key}" if prefix else str(key)
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _walk(name, before, after)
        elif not _same(before, after):
            found.append(Difference(name, before, after))
    return found


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return not _walk("", old, new)
    if isinstance(old, bool) is not isinstance(new, bool):
        return False
    return old == new or (old != old and new != new)


def _shown(value: Any) -> str:
    return value if value is ABSENT else repr(value)
