"""Errors that a user can act on, and the lazy doors of packages, which must not hide an error's cause."""

from __future__ import annotations

import difflib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .words import first_of

# What a sentence shows of a value that has no business to be there.
_LONGEST = 60


class UserError(ValueError):
    """A mistake in what the user wrote: one sentence with the numbers and the nearest right value.

    The command line prints it as ``error: …`` and exits with 2; no traceback is shown.
    """


class IndivisibleBatch(UserError):
    """A batch whose rows do not divide by what splits them; doors that name the rows say how they are set."""


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line; its kind where it says nothing.

    >>> one_line(ValueError("no key   in line 3")), one_line(KeyError())
    ('no key in line 3', 'KeyError')
    """
    return " ".join(str(error).split()) or type(error).__name__


def wrong(name: str, value: Any, wanted: str) -> UserError:
    """Return the error of an argument that is no such thing at all; `wanted` says what it has to be.

    >>> str(wrong("mesh", 3, "is no mesh; give it plan.make_mesh()"))
    'mesh=3 is no mesh; give it plan.make_mesh()'
    """
    text = " ".join(repr(value).split())
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}…"
    return UserError(f"{name}={text} {wanted}")


def check_word(name: str, word: Any, known: Iterable[str]) -> None:
    """Raise UserError, naming the nearest, for what is none of the words that an argument `name` may be.

    >>> check_word("remat", "dot", ["none", "dots"])
    Traceback (most recent call last):
    ...
    meshwright.sharding.errors.UserError: remat='dot' is unknown; did you mean 'dots'?
    """
    words = tuple(known)
    if not isinstance(word, str) or word not in words:
        raise wrong(name, word, f"is unknown; {nearest(str(word), words)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a clause naming what `word` most likely meant, or what there is to choose from.

    >>> nearest("fdsp", ["data", "fsdp", "tensor"])
    "did you mean 'fsdp'?"
    >>> nearest("q", ["data", "fsdp"])
    'known: data, fsdp'
    """
    names = [str(name) for name in known]
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {first_of(names, 12)}" if names else "there are none"


def nearest_divisors(size: int, wanted: int) -> str:
    """Name the divisors of `size` on either side of `wanted`, for an error message.

    >>> nearest_divisors(32, 3)
    '2 or 4'
    """
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    below = max((d for d in divisors if d <= wanted), default=None)
    above = min((d for d in divisors if d >= wanted), default=None)
    return " or ".join(str(d) for d in dict.fromkeys((below, above)) if d is not None)


def nearest_cuts(name: str, size: int, wanted: int, devices: int) -> str:
    """Name the nearest axes that divide a dimension of data, and sizes of it that `wanted` divides.

    >>> nearest_cuts("sequence", 30, 4, 8)
    '2, or sequence=28 or 32'
    """
    below = size // wanted * wanted
    sizes = " or ".join(str(one) for one in (below, below + wanted) if one)
    return f"{nearest_divisors(math.gcd(size, devices), wanted)}, or {name}={sizes}"


def door(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package that loads each of its names on first use.

    Args:
      package: the package's `__name__`.
      homes: public name → module below the package (with a dot in front: beside it) that defines it. No
        module may have the name of what it defines: importing it would put it in that one's place.

    The functions raise AttributeError for a name that is not in `homes`, and ImportError, with the cause, for
    a module that an AttributeError stops from loading: that error would reach Python's import statement,
    which takes it for a missing name and says no more than ``cannot import name``.

    >>> load, names = door("meshwright.sharding", {"nearest": "errors"})
    >>> load("nearest").__name__, names()
    ('nearest', ['nearest'])
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = importlib.util.resolve_name(f".{homes[name]}", package)
        try:
            value = getattr(importlib.import_module(home), name)
        except AttributeError as error:
            raise ImportError(f"{package}.{name} cannot be loaded: {home} fails with {error!r}") from error
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted(homes)
