"""What ends a run that began well."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run cannot go on, and not because of what the user wrote: one sentence that says why.

    The command line prints it as ``error: …`` and exits with 1; no traceback is shown.
    """
