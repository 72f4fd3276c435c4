"""What this machine offers a run, and what is wrong with it.

Nothing here starts JAX in the present process: a child does, under a time limit, because an accelerator that
another program holds, or whose driver is broken, makes JAX wait without end.
"""

from __future__ import annotations

from .check import Check as Check
from .check import render as render
from .compilers import compilers
from .devices import devices, probe, simulated
from .hosts import hosts
from .machine import cache, machine
from .variables import memory, variables
from .versions import flax, versions


def examine(*, timeout_seconds: float = 60.0) -> list[Check]:
    """Look at versions, devices, hosts, compilers, folders and environment of this machine.

    JAX gets `timeout_seconds` to list its devices, in a child process.
    """
    answer = probe(timeout_seconds)
    return [
        *versions(),
        *flax(answer),
        *devices(answer),
        *memory(answer),
        *simulated(),
        *hosts(),
        *compilers(),
        *machine(),
        *cache(),
        *variables(answer.get("settings")),
    ]
