"""The end of a whole process on an error, past what would wait for processes that wait for it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator

from ...sharding.errors import UserError
from ..errors import RunError, exit_code

# Process 0 holds the coordination service: once it is gone JAX aborts the others amid what they have to say.
_LAST_TO_LEAVE_SECONDS = 1.0

# How an error reads that only says that another process is gone (gloo, NCCL, the coordination service).
_PEER_GONE = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|peer|heartbeat|coordination ?service|UNAVAILABLE",
    re.IGNORECASE,
)


@contextlib.contextmanager
def fail_fast() -> Iterator[None]:
    """End the whole process, not only the block, on an error in a run of several processes.

    An error that is raised on instead meets JAX's exit barrier, which waits more than a minute for processes
    that are waiting for this one. With a single process the error is raised as ever.
    """
    try:
        yield
    except BaseException as error:
        import jax

        if jax.process_count() == 1 or (isinstance(error, SystemExit) and not error.code):
            raise
        _tell(error, jax.process_index())
        if jax.process_index() == 0:
            time.sleep(_LAST_TO_LEAVE_SECONDS)
        end_now(exit_code(error))


def end_now(code: int) -> None:
    """Leave this process with `code` after flushing what was printed and logged, past every exit handler."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _tell(error: BaseException, process_id: int) -> None:
    if isinstance(error, (UserError, RunError)):
        print(f"error: {error}", file=sys.stderr)
        return
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return
    traceback.print_exception(error)
    if is_lost_peer(error):
        print(
            f"process {process_id} lost another process of this run; the cause is in that one's output",
            file=sys.stderr,
        )


def is_lost_peer(error: BaseException) -> bool:
    """Tell whether `error` comes from XLA and only says that another process is gone."""
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) and _PEER_GONE.search(str(error)) is not None


def print_now(words: str) -> None:
    """Print to stderr past its buffer and its lock, which a thread that hangs may hold."""
    with contextlib.suppress(OSError):
        os.write(2, words.encode())
