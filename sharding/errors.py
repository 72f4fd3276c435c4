"""What a user is told when what they wrote cannot work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user wrote: one sentence with the numbers and the nearest right value.

    The command line prints it as ``error: …`` and exits with 2; no traceback is shown.
    """


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
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"known: {shown}" if names else "there are none"


def nearest_divisors(size: int, wanted: int) -> str:
    """Name the divisors of `size` on either side of `wanted`, for an error message.

    >>> nearest_divisors(32, 3)
    '2 or 4'
    """
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    below = max((d for d in divisors if d <= wanted), default=None)
    above = min((d for d in divisors if d >= wanted), default=None)
    return " or ".join(str(d) for d in dict.fromkeys((below, above)) if d is not None)
