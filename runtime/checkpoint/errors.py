"""What can be wrong with a checkpoint."""

from __future__ import annotations

from ..errors import RunError


class CheckpointError(RunError):
    """A checkpoint could not be written, or none that is whole is left; the message says where and why."""


class Damaged(Exception):
    """A checkpoint is not what was saved; the message names the leaf or the file.

    Raised inside this package and answered there by setting the checkpoint aside.
    """


def first_line(error: BaseException) -> str:
    """Return an error's kind and the first line of what it says; Orbax's errors have many."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
