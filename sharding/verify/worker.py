"""Process that compiles one step: ``python -m meshwright.sharding.verify.worker FOLDER``.

FOLDER has ``request.json`` and ``program.bin``; the process writes ``program.hlo.gz`` and ``answer.json`` to
it. It loads one compiler, that of the requested topology, and ends while that still works on what nobody
asked for.
"""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..compiled import schedule
from ..compiled.read import read_proof
from ..files import write_whole
from ..hardware.topology import Topology
from ..plans import arrays, file
from ..plans.record import Record
from ..xla.compiler import compiler_of
from ..xla.targets import describe
from . import scheduled

if TYPE_CHECKING:
    import jax
    from jax import export

# ``Ran out of memory in memory space hbm. Used 122.75G of 95.74G hbm.``, and when it is known early:
# ``Ran out of memory on HBM, the total … for HLO temporaries (68.50G) exceeds available HBM (15.75G).``
_RAN_OUT = re.compile(r"[Rr]an out of memory (?:in memory space|on) (\w+)")
_USED = re.compile(
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)"
    r"|\(([\d.]+)([KMGT]?)\) exceeds available \w+ \(([\d.]+)([KMGT]?)\)"
)
# Names that JAX gives the arguments of a function that takes ``*args``.
_ARGUMENT = re.compile(r"\bargs\[(\d+)\]")
# Share by which two sizes of one program may differ because of alignment.
_SLACK = 1e-3
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main(folder: pathlib.Path) -> None:
    """Compile what `folder` asks for and write the answer there."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    from jax.errors import JaxRuntimeError

    try:
        answer = compile_request(request, (folder / "program.bin").read_bytes(), folder)
    except JaxRuntimeError as error:  # the compiler's own error is an answer about the plan
        answer = failure(str(error))
    except Exception as error:  # any other is this process's and says nothing about the plan
        answer = {"outcome": "died", "message": f"{type(error).__name__}: {_first_lines(str(error))}"}
        traceback.print_exc()
    write_whole(folder / "answer.json", json.dumps(answer))


def compile_request(request: Mapping[str, Any], program: bytes, folder: pathlib.Path) -> dict[str, Any]:
    """Compile `program` as `request` says and return the answer; the program's text is left in `folder`."""
    from jax import export

    plan = file.from_dict(request["plan"], Record)
    topology = plan.topology
    dumps = folder / "dumps"
    dumps.mkdir()
    quick = request["quick"] and compiler_of(topology).shows_schedule
    if quick:
        _start_libtpu_with(scheduled.dump_arguments(dumps))
    elif compiler_of(topology).name == "libtpu" and request["schedules"]:
        _start_libtpu_with(schedule.dump_arguments(dumps))
    lowered = _lowered(export.deserialize(bytearray(program)), plan, request["donated"])
    options, start = request["options"] or None, time.perf_counter()
    if quick:
        made = scheduled.scheduled_or_compiled(lowered, options, dumps)
    else:
        made = lowered.compile(compiler_options=options)
    seconds = time.perf_counter() - start
    text = made if isinstance(made, str) else made.as_text()
    sizes = None if isinstance(made, str) else made.memory_analysis()
    if text is None or (sizes is None and not isinstance(made, str)):
        return {"outcome": "failed", "message": "the compiler shows neither a program's text nor its memory"}
    with gzip.open(folder / "program.hlo.gz", "wt", compresslevel=3) as written:
        written.write(text)
    proof = read_proof(
        _named(text, request["arguments"]),
        topology=topology,
        mesh=plan.mesh,
        peak_bytes=None if sizes is None else peak_of(sizes, topology),
        memory=None if sizes is None else memory_of(sizes),
        compile_seconds=seconds,
        versions=request["versions"],
        planned=plan,
        bundles=schedule.read_bundles(dumps),
        quick=isinstance(made, str),
    )
    return {"outcome": "compiled", "proof": proof.to_dict()}


def _lowered(exported: export.Exported, plan: Record, donated: int) -> jax.stages.Lowered:
    """Return a step that was exported, lowered for the plan's devices; the first `donated` arguments are."""
    import jax

    mesh = arrays.mesh_of(plan, devices=_devices(plan.topology))
    jitted = jax.jit(
        exported.call,
        in_shardings=exported.in_shardings_jax(mesh),
        out_shardings=jax.tree.unflatten(exported.out_tree, exported.out_shardings_jax(mesh)),
        donate_argnums=tuple(range(donated)),
    )
    return jitted.lower(*(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in exported.in_avals))


def _start_libtpu_with(arguments: str) -> None:
    """Add to what libtpu is started with in this process, which has not loaded it yet."""
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {arguments}".strip()


def _named(text: str, arguments: Sequence[str]) -> str:
    """Return the text with the program's arguments named by their paths in the state and the batch."""

    def path(match: re.Match[str]) -> str:
        number = int(match[1])
        return arguments[number] if number < len(arguments) else match[0]

    return _ARGUMENT.sub(path, text)


def peak_of(sizes: Any, topology: Topology) -> float | None:
    """Return the compiler's peak of a device's memory in bytes, None where it states the host's instead.

    The figure for GPUs includes arrays on the host. There the arguments, outputs and temporaries, for which
    XLA makes one allocation, are the device's part. The figure for TPUs is the larger one of the device's and
    the host's.
    """
    held, stated = memory_of(sizes), float(sizes.peak_memory_in_bytes)
    if held["host"] == 0:
        return stated
    if compiler_of(topology).host_is_device:
        return held["arguments"] + held["temporaries"] + held["outputs"]
    of_host = abs(stated - held["arguments"] - held["host"]) <= _SLACK * stated
    # A device cannot hold more than all that it is given, makes and works in.
    return None if of_host or stated > held["arguments"] + held["temporaries"] + held["outputs"] else stated


def memory_of(sizes: Any) -> dict[str, float]:
    """Return the compiler's sizes by what they are for, in bytes of one device."""
    return {
        "arguments": float(sizes.argument_size_in_bytes),
        "temporaries": float(sizes.temp_size_in_bytes),
        "outputs": float(sizes.output_size_in_bytes - sizes.alias_size_in_bytes),
        "code": float(sizes.generated_code_size_in_bytes),
        "host": float(
            sizes.host_temp_size_in_bytes
            + sizes.host_argument_size_in_bytes
            + sizes.host_output_size_in_bytes
        ),
    }


def failure(message: str) -> dict[str, Any]:
    """Return the answer for a compiler's error: which memory ran out and by how much, or the message.

    >>> failure("Ran out of memory in memory space hbm. Used 2.5G of 2.0G hbm.")["used_bytes"]
    2684354560.0
    """
    space, used = _RAN_OUT.search(message), _USED.search(message)
    if space is None:
        return {"outcome": "failed", "message": _first_lines(message)}
    answer: dict[str, Any] = {
        "outcome": "out_of_memory",
        "space": space[1].lower(),
        "message": _first_lines(message),
    }
    if used is not None:
        size, unit, limit, limit_unit = used.groups()[:4] if used[1] else used.groups()[4:]
        answer["used_bytes"] = float(size) * _UNITS[unit]
        answer["limit_bytes"] = float(limit) * _UNITS[limit_unit]
    return answer


def _first_lines(message: str, lines: int = 4, width: int = 400) -> str:
    return "\n".join(line[:width] for line in message.strip().splitlines()[:lines])


def _devices(topology: Any) -> Any:
    """Return the devices of a topology as its compiler describes them; for CPUs, simulated ones."""
    import jax

    if topology.chip.platform == "cpu":
        return jax.devices()
    return describe(topology).devices


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by Python's own way out, which would wait for a compiler that makes machine code for minutes.
    os._exit(0)
