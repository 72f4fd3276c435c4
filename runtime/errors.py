"""What ends a run that began well, and the exit codes of the command line."""

from __future__ import annotations

import signal

from ..sharding.errors import UserError

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 128 + signal.SIGINT


class RunError(RuntimeError):
    """A run cannot go on, and not because of what the user wrote: one sentence that says why.

    The command line prints it as ``error: …`` and exits with 1; no traceback is shown.
    """


def exit_code(error: BaseException) -> int:
    """Return the code that a process ends with when `error` reaches its top."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_FAILED
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED
