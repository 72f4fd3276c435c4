"""Hand-tuned layouts against planned ones, by one cost model: `python benchmarks/tuned.py CSV [--json]`.

The layouts are other people's and not in this repository: the path says where they are.

Each row's model is planned on its slice with its batch. Printed are the predicted step times of the layout
that people tuned and of the one that the planner chooses, and what each consists of.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import optax
from frameworks.execution import execution_of
from frameworks.record import record_for
from measured.rows import csv_file
from measured.tuned import Tuned, load
from meshwright.models import decoder
from meshwright.sharding import UserError
from meshwright.sharding.cost import Pricer
from meshwright.sharding.planner.declared import Declared
from meshwright.sharding.planner.inputs import Problem
from meshwright.sharding.planner.search import Priced, search
from meshwright.sharding.planner.slots import slot_bytes
from meshwright.sharding.program.layers import INPUT
from meshwright.sharding.words import remat_in_words

_OPTIMIZER = optax.adamw(3e-4)
# Chips without measured runs of MaxText → the one most like them that has some.
_RELATIVES = {"v6e": "v5e", "tpu7x": "v5p"}
# Time that two layouts may differ by and still count as equally fast.
_EQUAL = 1e-6


def compare(row: Tuned) -> dict[str, Any]:
    """Return the predicted costs of a hand-tuned layout and of the planner's own choice."""
    model = decoder(row.config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    shape = jax.ShapeDtypeStruct((row.batch, row.sequence), "int32")
    batch = dict.fromkeys(("tokens", "targets"), shape)
    problem = Problem(loss=model.loss, params=params, batch=batch, optimizer=_OPTIMIZER, names=model.names)
    chip = row.topology.chip
    record = record_for(_RELATIVES.get(chip.name, chip.name), "maxtext")
    pricer = Pricer(
        problem.profile,
        row.topology,
        optimizer_slots=slot_bytes(jax.eval_shape(_OPTIMIZER.init, params), params),
        calibration=record,
        execution=execution_of(record, row.topology),
    )
    capacity = float(chip.hbm_bytes or math.inf)
    remat = row.remat
    if not isinstance(remat, str):
        known = {*problem.profile.saved.named, INPUT}
        remat = {name: place for name, place in remat.items() if name in known}
    declared = Declared(mesh=row.mesh, remat=remat, microbatches=row.microbatches)
    # What people ran did fit, whatever is predicted of it.
    by_hand = search(problem.space(row.topology, declared), pricer.price, math.inf, each_size=False).best
    planned = search(problem.space(row.topology, Declared()), pricer.price, capacity, each_size=False)
    chosen = planned.best or (planned.misfits[0] if planned.misfits else None)
    assert by_hand is not None
    assert chosen is not None
    return {
        "name": row.name,
        "topology": str(row.topology),
        "tuned": _summary(by_hand, capacity),
        "planned": _summary(chosen, capacity),
        "no_slower": planned.best is not None
        and chosen.estimate.step_seconds <= by_hand.estimate.step_seconds * (1 + _EQUAL),
        "same_family": _family(by_hand) == _family(chosen),
    }


def _family(priced: Priced) -> tuple[bool, ...]:
    """Return which axes do something: FSDP or ZeRO over the batch's axes counts as one family."""
    mesh = priced.candidate.mesh
    return tuple(mesh.get(axis, 1) > 1 for axis in ("tensor", "context", "expert", "stage"))


def _summary(priced: Priced, capacity: float) -> dict[str, Any]:
    one = priced.candidate
    return {
        "mesh": {axis: size for axis, size in one.mesh.items() if size > 1},
        "remat": remat_in_words(one.remat, one.saved),
        "microbatches": one.microbatches,
        "step_seconds": priced.estimate.step_seconds,
        "peak_bytes": priced.estimate.peak_bytes,
        "fits": priced.estimate.peak_bytes <= capacity,
    }


def score(path: Path) -> dict[str, Any]:
    """Return every row's comparison, how many are no slower and of one family, and what is left out."""
    rows, left = load(path)
    found = []
    for row in rows:
        try:
            found.append(compare(row))
        except UserError as error:
            left.append((row.name, str(error)))
    return {
        "rows": found,
        "expressed": len(found),
        "no_slower": sum(row["no_slower"] for row in found),
        "same_family": sum(row["same_family"] for row in found),
        "not_expressible": [list(row) for row in left],
    }


def show(scores: dict[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=160)
    table = Table("hand-tuned layout", "tuned", "s", "GiB", "planned", "s", "GiB", "")
    for row in scores["rows"]:
        cells = []
        for side in (row["tuned"], row["planned"]):
            mesh = " ".join(f"{axis}{size}" for axis, size in side["mesh"].items())
            cells += [
                f"{mesh} {side['remat']} mb{side['microbatches']}",
                f"{side['step_seconds']:.2f}",
                f"{side['peak_bytes'] / 2**30:.0f}{'' if side['fits'] else '!'}",
            ]
        verdict = ("" if row["no_slower"] else "SLOWER ") + ("" if row["same_family"] else "other family")
        table.add_row(row["name"][:48], *cells, verdict)
    console.print(table)
    print(
        f"{scores['expressed']} layouts expressed: planned no slower in {scores['no_slower']}, "
        f"same family in {scores['same_family']}; ! marks what is predicted not to fit"
    )
    reasons = collections.Counter(reason for _, reason in scores["not_expressible"])
    for reason, count in reasons.most_common():
        print(f"not expressible: {count} rows: {reason}")


def main(arguments: list[str]) -> int:
    """Compare the layouts of the file that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("layouts", type=csv_file)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    scores = score(given.layouts)
    if given.json:
        print(json.dumps(scores))
    else:
        show(scores)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
