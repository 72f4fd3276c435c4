"""Child processes that start as forks of one that has imported what most of them import.

A Python that trains spends two seconds of processor time on imports, more than on its steps. Here one process
for all has imported, has taken no device, and forks for each command.

As a script this file is both ends. ``forks.py serve SOCKET`` imports and waits for commands. ``forks.py run
SOCKET ARGUMENTS`` stands for ``python ARGUMENTS``: it hands over its environment, folder, input and output,
passes signals on, and ends as the fork does, which ends with it.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence

# What a run of the command line imports, with all in its wake.
_IMPORTED = (
    "pytest",
    "meshwright.runtime.cli.main",
    "meshwright.runtime.train.run",
    "grain",
    "optax",
    "orbax.checkpoint",
)
_PR_SET_PDEATHSIG = 1


def forked(command: Sequence[object]) -> list[str]:
    """Return the command that does the same as `command`, which runs this Python, with its imports done.

    ``python -c SOURCE``, ``-m MODULE``, ``SCRIPT`` and, before them, ``-u`` or ``-P`` are understood. On
    other systems than Linux it is `command` itself.
    """
    python, *arguments = map(str, command)
    assert python == sys.executable
    if not sys.platform.startswith("linux"):
        return [python, *arguments]
    return [python, "-I", "-S", __file__, "run", _server(), *arguments]


@functools.cache
def _server() -> str:
    """Start the process that forks, which ends with this one, and return the path of its socket."""
    from meshwright.sharding import processes

    # A folder that the suite removes at its end (`conftest.py`).
    path = tempfile.mkdtemp(prefix="forks-", dir=os.environ["MESHWRIGHT_TEST_PROGRAMS"]) + "/socket"
    # JAX takes its settings from the environment when it is imported; each fork gives it its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, __file__, "serve", path]
    process = processes.start(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.stdout.read()
    return path


def _run(path: str, *arguments: str) -> None:
    """Have the server run a command, and end as it does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(path)
        request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        pid = int(server.recv(32))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGABRT):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        code = int(server.recv(32))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _serve(path: str) -> None:
    """Import; then, for each command, fork a process that forks the command and waits for it."""
    import gc
    import importlib

    import contexts

    for name in _IMPORTED:
        importlib.import_module(name)
    contexts.share()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        parent = os.getpid()
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                break
            client.close()
    _tie(parent)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, files, _, _ = socket.recv_fds(client, 2**20, 3)
    parent, pid = os.getpid(), os.fork()
    if pid:
        _wait_for(pid, client)
        os._exit(0)
    _tie(parent)
    client.close()
    _become(files=files, **json.loads(message))


def _tie(parent: int) -> None:
    """Have the kernel end this process when its parent ends."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _wait_for(pid: int, client: socket.socket) -> None:
    """Tell `client` the process id of a command and its exit code; end it if `client` ends first."""
    client.send(str(pid).encode())
    ended = os.pidfd_open(pid)
    ready, _, _ = select.select([ended, client], [], [])
    if ended not in ready:
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if ended in ready:
        client.send(str(os.waitstatus_to_exitcode(status)).encode())


def _become(arguments: list[str], environment: dict[str, str], folder: str, files: list[int]) -> None:
    """Run ``python ARGUMENTS`` in this process."""
    import runpy

    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for place, file in enumerate(files):
        os.dup2(file, place)
        os.close(file)
    # What is run in the background is given an ignored Ctrl-C, and would pass it on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    option = arguments.pop(0) if arguments[0] in ("-u", "-P") else ""
    sys.stdout.reconfigure(write_through="PYTHONUNBUFFERED" in environment or option == "-u")
    kind, *rest = arguments
    script = kind not in ("-c", "-m")
    here = [] if option == "-P" else [os.path.dirname(kind) if script else ""]
    sys.path[0:1] = [*here, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    _set_jax_up(environment)
    if script:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")
        return
    what, *rest = rest
    sys.argv = [kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), vars(sys.modules["__main__"]) | {"__name__": "__main__"})


def _set_jax_up(environment: dict[str, str]) -> None:
    """Give JAX the settings that it would have taken from the environment."""
    import jax

    # Of all: some can be set and are no attributes, of which is how much is optimised.
    known = jax.config.values
    for variable, text in environment.items():
        name = variable.lower()
        if variable.startswith("JAX_") and name in known:
            truth = text.lower() not in ("0", "false", "no", "off", "")
            held = known[name]
            value = truth if isinstance(held, bool) else type(held)(text) if held is not None else text
            jax.config.update(name, value)


if __name__ == "__main__":
    {"serve": _serve, "run": _run}[sys.argv[1]](*sys.argv[2:])
