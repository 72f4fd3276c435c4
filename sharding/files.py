"""Files and folders that appear whole or not at all, locks beside them, and the user's cache folder.

What is written is put together under a name that begins with a dot, in the folder where it will stand, and
then renamed: readers, other writers and a process that is killed midway never leave or see half of it. The
disk is not waited for, so that a machine that loses its power may lose what was written last.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# How often other processes may put a folder of their own in the place of one before it is given up.
_TRIES = 16


def user_cache() -> pathlib.Path:
    """Return ``$XDG_CACHE_HOME/meshwright``, by default ``~/.cache/meshwright``; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return pathlib.Path(base).expanduser() / "meshwright"


def expanded(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return `path` with a leading ``~`` filled in. Raises UserError for the home of a user there is not."""
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{os.fspath(path)!r} begins with the home folder of a user that is unknown"
        ) from None


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write `content`, text as UTF-8, in the place of the file at `path`, all at once.

    Raises OSError as `pathlib.Path.write_bytes` does; then what was there before is there still.
    """
    path = pathlib.Path(path)
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(aside, path)
    except OSError as error:
        # The name that the caller knows, not the one put together here.
        error.filename, error.filename2 = os.fspath(path), None
        raise
    finally:
        aside.unlink(missing_ok=True)


def write_asked(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write as `write_whole` in the place that a user names. Raises UserError where that cannot be done."""
    try:
        if not pathlib.Path(path).name:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"{os.fspath(path) or '.'} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def whole_folder(
    final: pathlib.Path, keep: Callable[[pathlib.Path], bool] = lambda _: False
) -> Iterator[pathlib.Path]:
    """Yield an empty folder that takes the place of `final` when the block ends well, and else is removed.

    `keep(final)` says whether what has come to stand there meanwhile, from another process, stays instead.
    Raises OSError where the folder cannot be made or moved.
    """
    aside = pathlib.Path(tempfile.mkdtemp(prefix=_prefix(final), dir=final.parent))
    try:
        yield aside
        _move(aside, final, keep)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _prefix(final: pathlib.Path) -> str:
    return f".{final.name}.{socket.gethostname()}."


def _move(aside: pathlib.Path, final: pathlib.Path, keep: Callable[[pathlib.Path], bool]) -> None:
    for _ in range(_TRIES):
        try:
            os.rename(aside, final)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if keep(final):
            return
        # Renamed before it is removed, so that nobody reads a folder that is half gone.
        doomed = pathlib.Path(tempfile.mkdtemp(prefix=_prefix(final), dir=final.parent))
        with contextlib.suppress(FileNotFoundError):
            os.rename(final, doomed / "replaced")
        shutil.rmtree(doomed, ignore_errors=True)
    raise FileExistsError(errno.EEXIST, "other processes keep replacing it", os.fspath(final))


@contextlib.contextmanager
def locked(final: pathlib.Path) -> Iterator[None]:
    """Hold the one lock for making `final`, so that of the processes of a machine one does the work.

    Removes what killed ones left of it. Only saves work: `whole_folder` is right without any lock, and so is
    the block on a file system that has none. Raises OSError where the lock's file cannot be made.
    """
    with open(final.with_name(f"{final.name}.lock"), "w") as stream:
        with contextlib.suppress(OSError):
            _lock(stream.fileno(), wait=True)
            for left in final.parent.glob(f"{_prefix(final)}*"):
                shutil.rmtree(left, ignore_errors=True)
        yield


class FolderInUse(Exception):
    """Another process has the folder; `owner` says which, as ``process 123`` or ``another process``."""

    def __init__(self, owner: str) -> None:
        super().__init__(f"in use by {owner}")
        self.owner = owner


class FolderLock:
    """Sole use of a folder until `release` or the end of the process, however it ends."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Take the lock.

        Raises `FolderInUse` when another process has it, and OSError where nothing can be written or the file
        system has no locks.
        """
        self._file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        try:
            _lock(self._file.fileno(), wait=False)
            self._file.seek(0)
            self._file.truncate()
            self._file.write(f"process {os.getpid()}\n")
            self._file.flush()
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise FolderInUse(owner) from None
        except OSError:
            self._file.close()
            raise

    def release(self) -> None:
        """Let others use the folder."""
        self._file.close()


def _lock(descriptor: int, *, wait: bool) -> None:
    """Lock an open file until it is closed; OSError where the system or the file system has no locks."""
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
