"""Capture a window of steps as an XLA trace.

Every process writes two files into one folder, ``<directory>/plugins/profile/<session>/``:

- ``<host>_<process>.xplane.pb``, which `read_profile` reads and XProf opens when pointed at `<directory>`
- ``<host>_<process>.trace.json.gz``, which ui.perfetto.dev opens
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ...sharding.errors import UserError
from ...sharding.files import write_whole
from ..errors import RunError
from . import marker
from .config import MAX_STEPS

#: The name under which a step's wait for data stands in a trace.
DATA_WAIT = "data_wait"
#: The name under which a step of training stands in a trace, with `step_num`.
STEP = "train_step"
#: The name under which the whole window stands in a trace.
WINDOW = "profile_window"
#: Where below a profile folder the sessions stand: the place that XProf looks in.
SESSIONS = Path("plugins", "profile")

#: A context within which nothing runs on the devices.
Quiet = Callable[[], contextlib.AbstractContextManager[object]]

# Steps after the window within which a device that the profiler left unusable shows it.
_SETTLING = 5


class ProfileWindow:
    """Captures `num_steps` steps from `start_step` on; outside of the window each call is one comparison.

    The loop calls `on_step_start`, `data_wait` and `on_step_end` for every step and `close` (or leaves the
    context) when it ends. The trace is opened and closed while nothing runs on the devices, and is written
    before the step after the window begins: a profiler that stops beside running work can end the process. A
    run that resumes inside the window captures its rest.

    While the window is open and for some steps after it, a file in the folder says so (`marker`): a process
    that dies in it leaves the file behind.
    """

    def __init__(
        self,
        *,
        start_step: int | None,
        num_steps: int = 3,
        directory: str | Path,
        say: Callable[[str], object] | None = None,
    ) -> None:
        """Plan a window; `start_step=None` captures nothing.

        `say` takes sentences on what was captured and what failed, and no failure is raised then: a profile
        is not worth the run. Without it failures are raised when the window opens and warned of in `close`.

        Raises:
            UserError: `num_steps` is not between 1 and 20, or `start_step` is negative.
        """
        if not 1 <= num_steps <= MAX_STEPS:
            nearest = min(max(num_steps, 1), MAX_STEPS)
            raise UserError(
                f"profile.num_steps={num_steps} must lie between 1 and {MAX_STEPS}; nearest: {nearest}"
            )
        if start_step is not None and start_step < 0:
            raise UserError(f"profile.start_step={start_step} is before the first step; nearest: 0")
        self._first = start_step if start_step is not None else -1
        self._end = self._first + num_steps if start_step is not None else -1
        self._directory = Path(directory)
        self._say = say
        self._recorder: _Recorder | None = None
        self._step: contextlib.AbstractContextManager[object] | None = None
        self._done = False
        self._captured = False
        self._steps: list[int] = []
        self._process: int | None = None
        self._seconds = 0.0
        self._failure: Exception | None = None

    @property
    def active(self) -> bool:
        """Whether a trace is being captured now."""
        return self._recorder is not None

    @property
    def captured(self) -> bool:
        """Whether a trace was captured and written."""
        return self._captured

    def opens_at(self, step: int) -> bool:
        """Whether step number `step` begins the trace."""
        return self._first <= step < self._end and self._recorder is None and not self._done

    def is_over(self, step: int) -> bool:
        """Whether nothing is captured from step number `step` on."""
        return self._done or step >= self._end

    def give_up(self, why: str) -> None:
        """Capture nothing, and say why."""
        self._done = True
        if self._say is not None:
            self._say(f"the profile of {self._words()} is left out, and training goes on: {why}")

    def on_step_start(self, step: int, quiet: Quiet = contextlib.nullcontext) -> None:
        """Begin step number `step`; the first one of the window begins the trace, within ``quiet()``.

        Raises:
            UserError: Another trace is being captured in this process, and nobody takes sentences.
        """
        if self._process is not None and self._done and step >= self._end + _SETTLING:
            self._unmark()
        if not self._first <= step < self._end:
            return
        import jax.profiler

        if self.opens_at(step):
            with quiet():
                self._open()
        if self._recorder is not None:
            self._step = jax.profiler.StepTraceAnnotation(STEP, step_num=step)
            self._step.__enter__()
            self._steps.append(step)

    def data_wait(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which the loop waits for its next batch."""
        if self._recorder is None:
            return contextlib.nullcontext()
        import jax.profiler

        return jax.profiler.TraceAnnotation(DATA_WAIT)

    def on_step_end(
        self, step: int, outputs: Any = None, quiet: Quiet = contextlib.nullcontext
    ) -> float | None:
        """End step number `step`, which gave `outputs`; the last one of the window ends the trace.

        Args:
            step: The step's number.
            outputs: Any arrays the step computes that later steps do not donate, such as its metrics:
                waited for at the window's two edges.
            quiet: The context in which nothing runs on the devices beside the loop's own steps.

        Returns:
            The `time.perf_counter` at which the outputs were there, where this waited for them; else None.
        """
        if step == self._first - 1:
            _wait_for(outputs)
            return time.perf_counter()
        if self._recorder is None:
            return None
        self._leave_step()
        if step < self._end - 1:
            return None
        _wait_for(outputs)
        done = time.perf_counter()
        with quiet():
            self._stop()
        return done

    def close(self) -> None:
        """End a window that the loop left early, and write its trace.

        Warns:
            UserWarning: The trace could not be written, and nobody takes sentences.
        """
        self._leave_step()
        self._stop()
        if self._failure is not None:
            warnings.warn(f"the profile could not be written: {self._failure}", stacklevel=2)
            self._failure = None

    def __enter__(self) -> ProfileWindow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        # An error that is not known to have another cause may be the profiler's, and the file says so.
        if error is None or isinstance(error, (UserError, RunError)) or not isinstance(error, Exception):
            self._unmark()

    def _open(self) -> None:
        import jax

        begun = time.perf_counter()
        self._process = jax.process_index()
        window = self._first, self._end - self._first
        recorder = _Recorder(self._directory, session=f"step_{self._first:08d}")
        try:
            marker.mark(self._directory, self._process, window)
            recorder.start()
        except (UserError, OSError) as error:
            self._done = True
            self._unmark()
            if self._say is None:
                raise
            self.give_up(str(error))
            return
        self._recorder = recorder
        self._seconds = time.perf_counter() - begun

    def _words(self) -> str:
        return _in_words(range(self._first, self._end))

    def _caught(self) -> str:
        """Return which steps the trace holds, beside those asked for where they are others."""
        asked = range(self._first, self._end)
        rest = "" if self._steps == list(asked) else f" (asked for: {_in_words(asked)})"
        return f"{_in_words(self._steps)} captured{rest}"

    def _leave_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _stop(self) -> None:
        if self._recorder is None:
            return
        begun = time.perf_counter()
        recorder, self._recorder = self._recorder, None
        self._done = True
        recorder.finish()
        try:
            recorder.write()
        except Exception as error:
            if self._say is None:
                self._failure = error
            else:
                self._say(f"the profile could not be written, and training goes on: {error}")
            return
        self._captured = True
        self._seconds += time.perf_counter() - begun
        if self._say is not None:
            self._say(f"profile: {self._caught()}, {self._seconds:.1f} s to open and to write")

    def _unmark(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):
                marker.unmark(self._directory, self._process)
            self._process = None


@contextlib.contextmanager
def capture(directory: str | Path) -> Iterator[None]:
    """Trace what runs inside the context into `directory`, and write it before leaving.

    Devices run behind the host: wait for the last result (``jax.block_until_ready``) inside the context.

    Raises:
        UserError: Another trace is being captured in this process.
    """
    recorder = _Recorder(Path(directory), session=time.strftime("capture_%Y%m%d_%H%M%S"))
    recorder.start()
    try:
        yield
    finally:
        recorder.finish()
        recorder.write()


class _Recorder:
    """One trace of this process. JAX names its files after the host alone, so two processes of one host would
    overwrite each other: each writes into a folder of its own, whose files are then moved to the session's.
    """

    def __init__(self, directory: Path, *, session: str) -> None:
        import jax

        self._process = jax.process_index()
        self._session = directory / SESSIONS / session
        self._scratch = directory / f".writing_{self._process}_{os.getpid()}"
        self._window: contextlib.AbstractContextManager[object] | None = None

    def start(self) -> None:
        import jax.profiler

        options = jax.profiler.ProfileOptions()
        # Following every Python call costs more than the steps themselves.
        options.python_tracer_level = 0
        self._scratch.mkdir(parents=True, exist_ok=True)
        try:
            jax.profiler.start_trace(self._scratch, profiler_options=options)
        except RuntimeError as error:
            shutil.rmtree(self._scratch)
            raise UserError(f"cannot start a profile: {error}") from error
        self._window = jax.profiler.TraceAnnotation(WINDOW)
        self._window.__enter__()

    def finish(self) -> None:
        """Mark the window's end."""
        if self._window is not None:
            self._window.__exit__(None, None, None)

    def write(self) -> None:
        """Stop the trace and put its files into the session's folder."""
        import jax.profiler

        try:
            jax.profiler.stop_trace()
            self._session.mkdir(parents=True, exist_ok=True)
            name = f"{socket.gethostname()}_{self._process}"
            sizes = {}
            for suffix in (".trace.json.gz", ".xplane.pb"):
                for written in self._scratch.glob(f"{SESSIONS}/*/*{suffix}"):
                    sizes[suffix] = written.stat().st_size
                    os.replace(written, self._session / f"{name}{suffix}")
            # A trace cut at the border of a message still parses: its size says whether it is whole.
            write_whole(self._session / f"{name}.sizes.json", json.dumps(sizes) + "\n")
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _in_words(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _wait_for(outputs: Any) -> None:
    import jax

    jax.block_until_ready(outputs)
