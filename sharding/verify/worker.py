"""The child process that compiles one step: `python -m meshwright.sharding.verify.worker FOLDER`.

FOLDER holds ``request.json`` and ``program.bin``; the child leaves ``program.hlo.gz`` and ``answer.json``
there.
Exactly one compiler is loaded, the one of the requested topology.
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

from ..files import write_whole

if TYPE_CHECKING:
    from ..hardware.topology import Topology

# ``Ran out of memory in memory space hbm. Used 122.75G of 95.74G hbm.``, and when it is known early:
# ``Ran out of memory on HBM, the total … for HLO temporaries (68.50G) exceeds available HBM (15.75G).``
_RAN_OUT = re.compile(r"[Rr]an out of memory (?:in memory space|on) (\w+)")
_USED = re.compile(
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)"
    r"|\(([\d.]+)([KMGT]?)\) exceeds available \w+ \(([\d.]+)([KMGT]?)\)"
)
# How JAX calls the arguments of a function that takes ``*args``.
_ARGUMENT = re.compile(r"\bargs\[(\d+)\]")
# By which share two sizes of one program may differ for alignment.
_SLACK = 1e-3
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main(folder: pathlib.Path) -> None:
    """Compile what `folder` asks for and write the answer there."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    from jax.errors import JaxRuntimeError

    try:
        answer = compile_request(request, (folder / "program.bin").read_bytes(), folder)
    except JaxRuntimeError as error:  # what a compiler raises is an answer for the parent to tell apart
        answer = failure(str(error))
    except Exception as error:  # anything else is ours, and says nothing lasting of the plan
        answer = {"outcome": "died", "message": f"{type(error).__name__}: {_first_lines(str(error))}"}
        traceback.print_exc()
    write_whole(folder / "answer.json", json.dumps(answer))


def compile_request(request: Mapping[str, Any], program: bytes, folder: pathlib.Path) -> dict[str, Any]:
    """Compile `program` as `request` says; return what is to be known of it."""
    import jax
    from jax import export

    from ..compiled.read import read_proof
    from ..compiled.schedule import dump_arguments, read_bundles
    from ..plans import arrays, file
    from ..plans.record import Record

    plan = file.from_dict(request["plan"], Record)
    topology = plan.topology
    schedules = folder / "schedules"
    schedules.mkdir()
    if topology.is_torus and request["schedules"]:
        started_with = (os.environ.get("LIBTPU_INIT_ARGS", ""), dump_arguments(schedules))
        os.environ["LIBTPU_INIT_ARGS"] = " ".join(started_with).strip()
    exported = export.deserialize(bytearray(program))
    mesh = arrays.mesh_of(plan, devices=_devices(topology))
    jitted = jax.jit(
        exported.call,
        in_shardings=exported.in_shardings_jax(mesh),
        out_shardings=list(exported.out_shardings_jax(mesh)),
        donate_argnums=tuple(range(request["donated"])),
    )
    arguments = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in exported.in_avals]
    lowered = jitted.lower(*arguments)
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=request["options"] or None)
    seconds = time.perf_counter() - start
    text, sizes = compiled.as_text(), compiled.memory_analysis()
    if text is None or sizes is None:
        return {"outcome": "failed", "message": "the compiler shows neither a program's text nor its memory"}
    with gzip.open(folder / "program.hlo.gz", "wt", compresslevel=3) as file:
        file.write(text)
    proof = read_proof(
        _named(text, request["arguments"]),
        topology=topology,
        mesh=plan.mesh,
        peak_bytes=peak_of(sizes, topology),
        memory=memory_of(sizes),
        compile_seconds=seconds,
        versions=request["versions"],
        planned=plan,
        bundles=read_bundles(schedules),
    )
    return {"outcome": "compiled", "proof": proof.to_dict()}


def _named(text: str, arguments: Sequence[str]) -> str:
    """Call the program's arguments by their paths in the state and the batch, not by their numbers."""

    def path(match: re.Match[str]) -> str:
        number = int(match[1])
        return arguments[number] if number < len(arguments) else match[0]

    return _ARGUMENT.sub(path, text)


def peak_of(sizes: Any, topology: Topology) -> float | None:
    """Return the compiler's peak of a device's memory; None where it states that of the host's.

    XLA's figure for GPUs holds what lies on the host too; there the sum of all arguments and temporaries,
    which one allocation covers, is the device's share. For TPUs it is that of the fullest memory, be it the
    host's.
    """
    held, stated = memory_of(sizes), float(sizes.peak_memory_in_bytes)
    if held["host"] == 0:
        return stated
    if not topology.is_torus:
        return held["arguments"] + held["temporaries"] + held["outputs"]
    return None if abs(stated - held["arguments"] - held["host"]) <= _SLACK * stated else stated


def memory_of(sizes: Any) -> dict[str, float]:
    """Return the compiler's sizes, bytes of one device, by what they are for."""
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
    """Return the answer for a compiler's error: which memory ran out and by how much, or what it said.

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
    """Return the devices that are described, or simulated ones for a topology of CPU devices."""
    import jax

    if topology.chip.platform == "cpu":
        return jax.devices()
    from ..xla.targets import describe

    return describe(topology).devices


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
