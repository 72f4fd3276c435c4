"""The layout of a measured row: mesh, storage, recomputation, microbatches, and as a candidate."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from meshwright.sharding import Topology
from meshwright.sharding.cost import Candidate

from .run import Run
from .shapes import Architecture, NotExpressible, whole


def _degree(row: Mapping[str, str], key: str) -> int:
    return int(row[key]) if row[key] else 1


def read_layout(
    row: Mapping[str, str], arch: Architecture, topology: Topology, framework: Mapping[str, Any]
) -> dict[str, Any]:
    """Return mesh, storage, recomputation and microbatches as the row says them."""
    tensor, context, stage = (_degree(row, k) for k in ("tp", "cp", "pp"))
    devices = whole(row, "n_devices")
    replicas, rest = divmod(devices, tensor * context * stage)
    if rest:
        raise NotExpressible(f"{tensor} x {context} x {stage} does not divide {devices} devices")
    zero_text = row["fsdp_zero_stage"]
    named = re.search(r"fsdp\s*=?\s*(\d+)", zero_text)
    fsdp = int(named[1]) if named else math.gcd(replicas, replicas // topology.num_slices)
    if "256-way per pod" in zero_text:
        fsdp = 256
    if replicas % fsdp:
        raise NotExpressible(f"fsdp {fsdp} does not divide {replicas} replicas")
    if "fsdp" in zero_text.lower():
        zero = 2 if "ZeRO-2" in zero_text else 3
    elif zero_text[:1].isdigit():
        zero = int(zero_text[0])
    else:
        zero = 1 if "distopt" in zero_text else framework["zero"]
    if stage > 1 and framework["zero_staged"] >= 0:
        zero = framework["zero_staged"]
    if arch.batch % replicas:
        raise NotExpressible(f"{arch.batch} sequences are not shared by {replicas} replicas")
    microbatches = _microbatches(row, arch.batch // replicas, stage, framework)
    if tensor > 1 and arch.kv_heads % tensor and (arch.heads // arch.kv_heads) % tensor:
        raise NotExpressible(f"tp={tensor} divides neither {arch.kv_heads} kv heads nor what shares them")
    # Experts are spread over replicas, those that share their parameters first; where over the devices of a
    # tensor group too, each of these has part of an expert's width instead.
    expert = math.gcd(_degree(row, "ep"), replicas) if dict(arch.extra).get("experts") else 1
    data = replicas // math.lcm(fsdp, expert) if fsdp % expert else replicas // fsdp
    return {
        "mesh": {
            "data": data,
            "fsdp": replicas // expert // data,
            "tensor": tensor,
            "context": context,
            "expert": expert,
            "stage": stage,
        },
        "sequence_parallel": row["sp"] == "1" or (not row["sp"] and tensor > 1),
        "zero": zero,
        "remat": _remat(row, framework),
        "saved": tuple(framework["saved"]),
        "microbatches": microbatches,
        "interleave": _interleave(row) if stage > 1 else 1,
    }


def _remat(row: Mapping[str, str], framework: Mapping[str, Any]) -> str:
    recompute = row["recompute"]
    if not recompute:
        # A rate that counts recomputed work tells that there was some.
        return "full" if "incl. recompute" in row["notes"] else framework["remat"]
    if recompute.startswith("full"):
        return "full"
    if recompute.startswith("minimal") or "offload" in recompute:
        return "dots"
    return framework["remat"] if "selective" in recompute else "none"


def _interleave(row: Mapping[str, str]) -> int:
    """Return the chunks of a stage; two where a row says no more than that they are interleaved."""
    text = row["schedule_interleave"]
    found = re.search(r"(?:VP=|v=|VPP=)(\d+)", text)
    return int(found[1]) if found else 2 if text.lower().startswith("interleaved") else 1


def _microbatches(row: Mapping[str, str], per_replica: int, stage: int, framework: Mapping[str, Any]) -> int:
    if row["microbatch"]:
        # A microbatch that does not divide leaves a smaller last one.
        return max(1, math.ceil(per_replica / float(row["microbatch"])))
    if row["grad_accum"]:
        return int(float(row["grad_accum"]))
    if framework["microbatches"] == "stages":
        return math.gcd(per_replica, stage)
    return per_replica if stage > 1 else 1


def candidate(run: Run, program: Any) -> Candidate:
    """Return the candidate of a row over its traced program."""
    layout, mesh = run.layout, run.layout["mesh"]
    replicas = ("data", "fsdp", "expert")
    axes: dict[int, tuple[str, ...]] = {}
    if program.batch_dims:
        axes[program.batch_dims[0]] = replicas
    tensor_first = "kv_heads" if run.architecture.kv_heads % mesh["tensor"] == 0 else "heads"
    for argument in program.parameters:
        for name, dims in zip(argument.names, argument.dims, strict=True):
            if not dims:
                continue
            if name == "heads":
                by_size = {program.dims[d].name.split(".")[0]: d for d in dims}
                axes[by_size.get(tensor_first, dims[0])] = ("tensor",)
            elif name in ("mlp", "vocab"):
                axes[dims[0]] = ("tensor",)
            elif name == "experts":
                axes[dims[0]] = ("expert",)
            elif name == "layers":
                axes[dims[0]] = ("stage",)
    along = (("context",) if mesh["context"] > 1 else ()) + (
        ("tensor",) if layout["sequence_parallel"] else ()
    )
    tokens = next(a for a in program.arguments if not a.is_parameter)
    for dim in tokens.dims[1]:
        axes[dim] = along
    shards = {a.index: _shares(a, axes, layout["zero"], mesh) for a in program.parameters}
    none: dict[int, Any] = {}
    return Candidate(
        mesh=mesh,
        dims=axes,
        stored=shards if layout["zero"] == 3 else none,
        gradients=shards if layout["zero"] == 2 else none,
        optimizer=shards if layout["zero"] in (1, 2) else none,
        remat=layout["remat"],
        saved=dict.fromkeys(layout["saved"], "device") if layout["remat"] == "names" else {},
        microbatches=layout["microbatches"],
        interleave=layout["interleave"],
    )


def _shares(
    argument: Any, axes: Mapping[int, tuple[str, ...]], zero: int, mesh: Mapping[str, int]
) -> tuple[tuple[str, ...], ...]:
    """Return the axes that a parameter's shares lie over, on top of those that it is computed with."""
    own = tuple(tuple(x for dim in composition for x in axes.get(dim, ())) for composition in argument.dims)
    if not own:
        return ()
    computed = {axis for entry in own for axis in entry}
    over = ("fsdp", "context", "expert") if zero == 3 else ("data", "fsdp", "context", "expert")
    shared = tuple(axis for axis in over if axis not in computed and mesh[axis] > 1)
    return (shared + own[0], *own[1:])
