"""What users may write goes on working: nothing is lost from `tests/api.txt`, what is new stands in it."""

from __future__ import annotations

import api
import pytest


def test_nothing_that_users_write_is_lost() -> None:
    lost = missing(api.read(), api.api())
    assert not lost, (
        f"{lost}: removing a name takes a line in CHANGELOG.md; then strike it from tests/api.txt"
    )


def test_what_is_new_is_listed() -> None:
    assert not missing(api.api(), api.read()), "run `python tests/api.py`, which adds it to tests/api.txt"


@pytest.mark.parametrize(
    ("now", "lost"),
    [
        ({"a.plan": {"mesh", "names"}}, []),
        ({"a.plan": {"mesh", "more"}}, ["a.plan(names)"]),
        ({"b": set()}, ["a.plan"]),
    ],
)
def test_a_name_and_an_argument_that_go_are_seen(now: api.Api, lost: list[str]) -> None:
    assert missing({"a.plan": {"mesh", "names"}}, now) == lost


def missing(listed: api.Api, found: api.Api) -> list[str]:
    """Return what `listed` has and `found` has not."""
    names = [name for name in listed if name not in found]
    words = [f"{n}({w})" for n in listed if n in found for w in sorted(listed[n] - found[n])]
    return sorted(names + words)
