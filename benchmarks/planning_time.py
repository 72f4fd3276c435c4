"""How long planning takes on a processor: trace and search, without imports, and one candidate's price.

    python benchmarks/planning_time.py [--json]

Each case is planned twice in this process and the second time counts, so that what Python and JAX load once
is not part of it. It is processor time, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax
import optax
from meshwright.models import decoder, preset
from meshwright.sharding import Topology, plan
from meshwright.sharding.planner.declared import Declared
from meshwright.sharding.planner.inputs import Problem

# Preset, topology, rows of the global batch, tokens of a row, target in seconds.
CASES = (
    ("llama3-8b", "v5p:4x4x8", 512, 8192, 1.0),
    ("llama3-405b", "h100:2048x8", 2048, 8192, 3.0),
    ("deepseek-v3", "h100:256x8", 8192, 4096, 5.0),
)
BATCH = ("tokens", "targets", "segment_ids", "positions")
PRICED = 50


def measure(name: str, topology: str, rows: int, sequence: int) -> dict[str, Any]:
    """Return the seconds that planning and pricing take, and what was planned."""
    model = decoder(preset(name))
    first = jax.eval_shape(model.init, jax.random.key(0))
    params, beside = first[0] if model.has_state else first, {}
    if model.has_state:
        beside["state"] = first[1]
    batch = {key: jax.ShapeDtypeStruct((rows, sequence), "int32") for key in BATCH}
    optimizer = optax.adamw(3e-4)
    for _ in range(2):
        # A new function each time, so that nothing of the trace is remembered.
        def loss(params: Any, batch: Any, *state: Any) -> Any:
            return model.loss(params, batch, *state)

        start = time.process_time()
        made = plan(loss, params, batch, topology=topology, optimizer=optimizer, names=model.names, **beside)
        seconds = time.process_time() - start
    given = {"params": params, "batch": batch, "optimizer": optimizer, "names": model.names, **beside}
    problem = Problem(loss=model.loss, **given)
    where = Topology.parse(topology)
    layouts = problem.space(where, Declared()).layouts[:PRICED]
    pricer = problem.pricer(where)
    start = time.process_time()
    for layout in layouts:
        pricer.price(layout)
    priced = (time.process_time() - start) / len(layouts)
    assert made.estimate is not None
    return {
        "model": name,
        "topology": topology,
        "planning_seconds": seconds,
        "price_seconds": priced,
        "mesh": dict(made.mesh),
        "remat": made.remat,
        "microbatches": made.microbatches,
        "step_seconds": made.estimate.step_seconds,
    }


def main() -> None:
    """Print a line for each case, or all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    rows = [{**measure(*case), "target_seconds": target} for *case, target in CASES]
    if parser.parse_args().json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        mesh = " x ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1)
        print(
            f"{row['model']} on {row['topology']}: planned in {row['planning_seconds']:.2f} s "
            f"(target {row['target_seconds']:.0f} s), {1e3 * row['price_seconds']:.2f} ms a layout; {mesh}, "
            f"remat={row['remat']}, microbatches={row['microbatches']}"
        )


if __name__ == "__main__":
    main()
