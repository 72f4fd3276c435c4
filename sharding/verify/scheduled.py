"""The program as a compiler schedules it, read before machine code is made of it: the quick proof.

libtpu knows within seconds which collectives a step has, in which order everything runs and what lies in
memory; the minutes after that are machine code. It writes the scheduled program to a folder between the two
(`Compiler.shows_schedule`), where it is read while the compiler is still at work. Left out are what machine
code brings: cycles, the algorithms of collectives, and whether a kernel fits the chip's own memory.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import threading
import time
from typing import Any

from ..hardware.topology import Topology
from ..xla.compiler import compiler_of

_FILES = "*-TLP-hlo.txt"
_WAIT_SECONDS = 0.1
# The niceness of what nobody waits for. Linux keeps one for each thread.
_LEAST = 19


def shows_schedule(topology: Topology) -> bool:
    """Whether the compiler of `topology` writes what it scheduled before it makes machine code."""
    return compiler_of(topology).shows_schedule


def dump_arguments(folder: pathlib.Path) -> str:
    """Return the value of ``LIBTPU_INIT_ARGS`` with which libtpu writes its scheduled program to `folder`.

    libtpu 0.0.42 and 0.0.50 know these arguments. One that a version does not know ends its process.
    """
    return " ".join(
        (f"--xla_jf_dump_to={folder}", "--xla_jf_dump_hlo_text=true", "--xla_jf_dump_llo_text=false")
    )


def scheduled_or_compiled(lowered: Any, options: Any, folder: pathlib.Path) -> Any:
    """Return the text of the scheduled program as soon as it lies in `folder`, or what is compiled before.

    The compiler cannot be stopped and works on in threads, which are then the last to be given a core: end
    the process when the answer is written.

    Args:
      lowered: a `jax.stages.Lowered`, compiled in a process that started with `dump_arguments`.
      options: of the compiler, None for none.
      folder: where the compiler writes.

    Raises:
      JaxRuntimeError: what the compiler says of a program that it refuses before it has scheduled it.
    """
    ended: dict[str, Any] = {}

    def work() -> None:
        try:
            ended["compiled"] = lowered.compile(compiler_options=options)
        except BaseException as error:  # handed to the thread that waits
            ended["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        if (text := _whole_text(folder)) is not None:
            _let_others_go_first()
            return text
        thread.join(_WAIT_SECONDS)
    if "error" in ended:
        raise ended["error"]
    return ended["compiled"]


def _let_others_go_first() -> None:
    """Have all threads of this process but the one that calls wait for whatever else wants a core."""
    for task in pathlib.Path("/proc/self/task").glob("*"):
        if int(task.name) != threading.get_native_id():
            with contextlib.suppress(OSError):  # of a thread that has ended
                os.setpriority(os.PRIO_PROCESS, int(task.name), _LEAST)


def _whole_text(folder: pathlib.Path) -> str | None:
    """Return a scheduled program that lies in `folder` and is written to its end, else None."""
    for path in folder.glob(_FILES):
        size = path.stat().st_size
        time.sleep(_WAIT_SECONDS)
        with contextlib.suppress(UnicodeDecodeError):
            text = path.read_text(encoding="utf-8")
            if path.stat().st_size == size and text.rstrip().endswith("}"):
                return text
    return None
