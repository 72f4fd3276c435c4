"""Our compiled steps beside MaxText's: `python benchmarks/maxtext.py [--only WORD] [--json]`.

Each row of maxtext_rows.toml is planned with MaxText's mesh, batch and nearest rematerialisation, compiled
for its slice, which is not here, and read: peak memory of a device, every collective's bytes and the seconds
that its links are busy. MaxText's bytes, as its compiled steps had them, become seconds by the same links.
`--layers N` compiles a shallower model, for looking at its collectives, not for comparing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
from meshwright.models import decoder, preset
from meshwright.sharding import Topology, UserError, plan
from meshwright.sharding.compiled.wires import Algorithm, Fabric
from meshwright.sharding.cost.calibration import calibration_for
from meshwright.sharding.plans.proof import CompiledCollective
from meshwright.sharding.verify.verify import verify
from meshwright.sharding.xla.options import options_for

_ROWS = Path(__file__).with_name("maxtext_rows.toml")
# Kinds whose results are whole arrays, so that their bytes compare.
_WHOLE = ("all_gather", "all_reduce")
_BATCH = ("tokens", "targets", "segment_ids", "positions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration, ours and MaxText's; seconds are those that links are busy, of one step."""

    name: str
    outcome: str
    peak_gb: float
    maxtext_peak_gb: float
    seconds: float
    exposed_seconds: float
    maxtext_seconds: float
    step_seconds: float
    compile_seconds: float
    collectives: tuple[CompiledCollective, ...]
    maxtext_bytes: Mapping[str, float]
    message: str = ""


def measure(row: Mapping[str, Any], layers: int | None, plain: bool) -> Row:
    """Plan and compile one row, with the compiler's own defaults if `plain`."""
    changes = {**row.get("overrides", {}), **({} if layers is None else {"layers": layers})}
    model = decoder(preset(row["model"], compute_dtype="bfloat16", **changes))
    loss = jax.jit(model.loss)
    params = jax.eval_shape(jax.jit(model.init), jax.random.key(0))
    batch = {key: jax.ShapeDtypeStruct((row["rows"], row["sequence"]), "int32") for key in _BATCH}
    optimizer = optax.adamw(3e-4)
    made = plan(
        loss,
        params,
        batch,
        topology=row["topology"],
        optimizer=optimizer,
        names=model.names,
        mesh=row["mesh"],
        remat=row["remat"],
        microbatches=1,
    )
    if not plain:
        made = dataclasses.replace(made, compiler_options=options_for(Topology.parse(row["topology"])))
    verdict = verify(made, loss, params, batch, optimizer)
    found = verdict.proof.collectives if verdict.proof is not None else ()
    return Row(
        name=row["name"],
        outcome=verdict.outcome,
        peak_gb=verdict.peak_bytes / 1e9,
        maxtext_peak_gb=row["peak_gb"],
        seconds=sum(one.seconds for one in found),
        exposed_seconds=sum(one.exposed_seconds for one in found),
        maxtext_seconds=sum(maxtext_seconds(row, one, _size(one, found)) for one in row["collectives"]),
        step_seconds=0.0 if verdict.proof is None else verdict.proof.step_seconds,
        compile_seconds=0.0 if verdict.proof is None else verdict.proof.compile_seconds,
        collectives=found,
        maxtext_bytes={f"{one['kind']}/{'×'.join(one['axes'])}": one["bytes"] for one in row["collectives"]},
        message=verdict.message,
    )


def _size(one: Mapping[str, Any], ours: Sequence[CompiledCollective]) -> float:
    """Return the bytes of one of our collectives of whole arrays over the axes of MaxText's `one`.

    Into how many collectives MaxText's bytes go was not recorded: each is taken to be as large as ours.
    """
    large = [found for found in ours if found.axes == tuple(one["axes"]) and found.kind in _WHOLE]
    total = sum(found.bytes for found in large)
    return sum(found.bytes * found.bytes / found.count for found in large) / total if total else one["bytes"]


def maxtext_seconds(row: Mapping[str, Any], one: Mapping[str, Any], size: float) -> float:
    """Return the seconds of one kind of MaxText's collectives over the links that the row gives it.

    By the model that ours are read with, in collectives of `size` bytes each.
    """
    topology = Topology.parse(row["topology"])
    mesh = row["mesh"]
    fabric = Fabric(topology, mesh, calibration_for(topology.chip.name))
    devices = np.arange(topology.num_devices).reshape(tuple(mesh.values()))
    last = [list(mesh).index(axis) for axis in one["axes"]]
    groups = np.moveaxis(devices, last, range(-len(last), 0))
    groups = groups.reshape(-1, math.prod(mesh[axis] for axis in one["axes"]))
    if one["kind"] == "collective_permute":
        groups = np.stack([groups, np.roll(groups, -1, axis=1)], axis=-1).reshape(-1, 2)
    written = tuple(tuple(group) for group in groups.tolist())
    # The result of a reduce-scatter is one device's part of what went in.
    parts = len(written[0]) if one["kind"] == "reduce_scatter" else 1
    algorithm = Algorithm(name="that of ours", drives=one["links"])
    count = max(one["bytes"] / size, 1.0)
    return count * fabric.seconds(one["kind"], written, algorithm, one["bytes"] * parts / count)


def show(row: Row) -> None:
    """Print a row and the collectives it consists of."""
    print(
        f"{row.name:16} peak {row.peak_gb:6.2f} GB of MaxText's {row.maxtext_peak_gb:6.2f} "
        f"({row.peak_gb / row.maxtext_peak_gb:.2f}), communication {row.seconds:6.3f} s of "
        f"{row.maxtext_seconds:6.3f} ({row.seconds / row.maxtext_seconds:.2f}), "
        f"exposed {row.exposed_seconds:6.3f}, step {row.step_seconds:6.3f} s, {row.outcome} {row.message}"
    )
    for one in sorted(row.collectives, key=lambda one: -one.seconds):
        if one.seconds > 0.01 * row.seconds:
            print(
                f"    {one.kind:18} {'×'.join(one.axes) or '-':12} {one.count:6.0f} x "
                f"{one.bytes / 1e9:8.2f} GB "
                f"{one.seconds:7.4f} s, exposed {one.exposed_seconds:7.4f}  {one.algorithm}"
            )
    theirs = ", ".join(f"{name} {bytes_ / 1e9:.1f} GB" for name, bytes_ in row.maxtext_bytes.items())
    print(f"    MaxText: {theirs}", flush=True)


def main() -> int:
    """Print every row, or all as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--layers", type=int, help="compile so many layers instead")
    parser.add_argument("--plain", action="store_true", help="without our compiler options")
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    found = []
    for row in tomllib.loads(_ROWS.read_text(encoding="utf-8"))["row"]:
        if words.only in row["name"]:
            try:
                found.append(measure(row, words.layers, words.plain))
            except UserError as error:
                print(f"{row['name']}: {error}", file=sys.stderr)
                continue
            if not words.json:
                show(found[-1])
    if words.json:
        print(json.dumps([dataclasses.asdict(row) for row in found], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
