"""Plans and estimates that no change may alter unnoticed: `python tests/frozen/write.py` writes them anew.

Each file beside this one holds what is decided for one config on one topology, what it is estimated to take,
and the figures of the layouts it was preferred to. Sentences, which may be put better, are left out, and so
is the fingerprint of the traced program, which differs from one JAX to the next; all the rest is the same
for every JAX that is supported. `shipped.json` holds a hash of what each plan under configs/plans decides.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from meshwright.runtime.config.config import load
from meshwright.runtime.train.planning import plan_config, plan_of
from meshwright.sharding import Plan, Topology

HERE = pathlib.Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
SHIPPED = HERE / "shipped.json"
# Topologies that these configs are planned for besides their own.
TOPOLOGIES = (
    *("h100:4x8", "v5e:16x16", "v6e:16x16", "v4:4x4x8"),
    *("b200:8x8", "tpu7x:4x4x8", "mi300x:8x8", "a100:16x8"),
)
EVERYWHERE = ("llama3-8b", "llama3-70b")

# What a plan holds beside its decision.
_BESIDE = {"format", "notes", "origin", "estimate", "alternatives", "refused", "proof"}
# One line for each of their entries.
_TABLES = ("dims", "params", "batch", "moments")


def cases() -> dict[str, tuple[str, str | None]]:
    """Return each case's name → its config and the topology that takes the place of the config's own."""
    found: dict[str, tuple[str, str | None]] = {}
    for name in sorted(path.stem for path in CONFIGS.glob("*.yaml")):
        found[name] = (name, None)
        for topology in TOPOLOGIES if name in EVERYWHERE else ():
            found[f"{name}.{topology.replace(':', '-')}"] = (name, topology)
    return found | {"quickstart.declared": ("quickstart", None)}


@functools.cache
def planned(case: str) -> Plan:
    """Plan a case, once; of the quickstart both what is searched for and what it declares."""
    name, topology = cases()[case]
    path = CONFIGS / f"{name}.yaml"
    found = plan_config(load(path, ["plan=auto"] if name == "quickstart" else []), topology)
    if case.endswith(".declared"):
        return plan_of(load(path, []), found.shapes, Topology.parse(found.plan.topology), found.optimizer)
    return found.plan


def decided(plan: Plan) -> dict[str, Any]:
    """Return what decides the program, as plain values; what is absent, empty or none is left out."""
    record = json.loads(json.dumps(plan.to_dict()))
    return {key: value for key, value in record.items() if key not in _BESIDE and value}


def frozen(plan: Plan) -> dict[str, Any]:
    """Return what is kept of a plan: its decision, and every figure that led to it."""
    record = json.loads(json.dumps(plan.to_dict()))
    return {
        "decided": decided(plan),
        "estimate": record.get("estimate"),
        "refused": sorted(record.get("refused", ())),
        "alternatives": [_alternative(row) for row in record.get("alternatives", ())],
    }


def _alternative(row: dict[str, Any]) -> dict[str, Any]:
    layout = ("mesh", "sharded", "storage", "remat", "microbatches", "fits")
    figures = ("step_seconds", "peak_bytes")
    return {key: row[key] for key in layout} | {key: row["estimate"][key] for key in figures}


def shipped() -> Iterable[pathlib.Path]:
    """Return the files of the plans that come with their proofs."""
    return sorted((CONFIGS / "plans").glob("*.plan.json"))


def hashed(path: pathlib.Path) -> str:
    """Return the hash of what a plan's file decides, read and checked."""
    text = json.dumps(decided(Plan.load(path)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def text_of(record: dict[str, Any], depth: int = 0) -> str:
    """Return a frozen plan as JSON with a line for each array, dimension, figure and alternative."""
    inner = "  " * (depth + 1)
    rows = [
        f"{inner}{json.dumps(key)}: "
        + (
            text_of(value, depth + 1)
            if isinstance(value, dict) and value and depth < (2 if key in _TABLES else 1)
            else _listed(value, inner)
        )
        for key, value in record.items()
    ]
    return "{\n" + ",\n".join(rows) + "\n" + "  " * depth + "}"


def _listed(value: Any, indent: str) -> str:
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return json.dumps(value)
    return "[\n" + ",\n".join(f"{indent}  {json.dumps(row)}" for row in value) + f"\n{indent}]"


def main() -> None:
    """Write every case, and the hashes of the shipped plans."""
    for case in cases():
        (HERE / f"{case}.json").write_text(text_of(frozen(planned(case))) + "\n", encoding="utf-8")
    SHIPPED.write_text(json.dumps({path.name: hashed(path) for path in shipped()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
