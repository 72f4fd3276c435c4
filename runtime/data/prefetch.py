"""Makes things ahead of their use, in one thread that ends when its user does."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class _End:
    """The source is exhausted, or failed with `error`."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Prefetch(Generic[T]):
    """An iterator that keeps up to `depth` items of another one ready.

    `start` is called, and its iterator run, in a thread of its own. What it raises is raised by `next`, in
    its turn. `close` (also on leaving a ``with`` block, on garbage collection and at interpreter exit) stops
    the thread and waits for it. `wait_seconds` is how long the last `next` waited.
    """

    def __init__(self, start: Callable[[], Iterator[T]], *, depth: int) -> None:
        self.wait_seconds = 0.0
        self._ready: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._making = threading.Lock()
        self._hand: list[T] = []
        # The thread must not hold `self`, or it would never be collected.
        arguments = (start, self._ready, self._stop, self._making, self._hand)
        self._thread = threading.Thread(target=_run, args=arguments, name="meshwright-prefetch", daemon=True)
        self._finalizer = weakref.finalize(self, _close, self._ready, self._stop, self._thread)
        self._finalizer.atexit = False
        # A hook of our own runs before those that jax registered on import: the thread uses jax.
        atexit.register(self._finalizer)
        self._thread.start()

    def __iter__(self) -> Prefetch[T]:
        return self

    def __next__(self) -> T:
        if self._stop.is_set():
            raise StopIteration
        began = time.perf_counter()
        item = self._ready.get()
        self.wait_seconds = time.perf_counter() - began
        if isinstance(item, _End):
            self.close()
            if item.error is not None:
                raise item.error
            raise StopIteration
        return item

    @contextlib.contextmanager
    def held(self) -> Iterator[list[T]]:
        """Make nothing more within the block, which gets what was made and not taken yet."""
        with self._making:
            with self._ready.mutex:
                ready = [*self._ready.queue]
            yield [item for item in [*ready, *self._hand] if not isinstance(item, _End)]

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and wait for it; what was ready is dropped. May be called again."""
        atexit.unregister(self._finalizer)
        self._finalizer()


def _run(
    start: Callable[[], Iterator[T]],
    ready: queue.Queue[T | _End],
    stop: threading.Event,
    making: threading.Lock,
    hand: list[T],
) -> None:
    end = _End()
    try:
        items = start()
        try:
            while not stop.is_set():
                with making:
                    hand[:] = itertools.islice(items, 1)
                if not hand:
                    break
                ready.put(hand[0])
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
    except BaseException as error:  # handed to the thread that waits
        end = _End(error)
    if not stop.is_set():
        ready.put(end)


def _close(ready: queue.Queue[T | _End], stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    # Emptied until the thread has gone: it may be about to put one more.
    while thread.is_alive() and thread is not threading.current_thread():
        try:
            while True:
                ready.get_nowait()
        except queue.Empty:
            thread.join(timeout=0.02)
