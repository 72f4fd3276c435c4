"""Plan, prove and write configs/plans: `python benchmarks/ship_plans.py [--only WORD] [--top N]`.

Each config is planned for each of its slices, compiled whole by the real compiler and saved with its proof,
as CONFIG.TOPOLOGY.plan.json; with --top N it is the fastest of so many by the compiler's word. A config is
trained by one with `plan=configs/plans/…`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from meshwright.runtime.config import load
from meshwright.runtime.planning import plan_config
from meshwright.sharding import UserError
from meshwright.sharding.planner.reasons import gib, layout_in_words, seconds

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = {
    "llama3-8b": ("v5e:16x16", "v6e:16x16", "v5p:4x4x8", "h100:4x8"),
    "llama3-70b": ("v5p:8x8x8", "v6e:16x16", "h100:32x8"),
    "llama3-405b": ("v5p:8x8x16", "2*v6e:16x16"),
}


def path_of(config: str, topology: str) -> Path:
    """Return where the plan of a config for a topology stands."""
    return _CONFIGS / "plans" / f"{config}.{topology.replace(':', '-').replace('*', 'x')}.plan.json"


def main() -> int:
    """Write each plan and say what it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="plans whose file's name contains this")
    parser.add_argument("--top", type=int, default=1, help="plans to compile and choose from")
    given = parser.parse_args()
    only, failed = given.only, 0
    for config, topologies in SHIPPED.items():
        for topology in topologies:
            path = path_of(config, topology)
            if only not in path.name:
                continue
            try:
                planned = plan_config(load(_CONFIGS / f"{config}.yaml", [f"topology={topology}"]))
                made = planned.verified(given.top).plan
            except UserError as error:
                failed += 1
                print(f"{path.name}: {error}", flush=True)
                continue
            made.save(path)
            assert made.proof is not None
            print(
                f"{path.name}: {layout_in_words(made.mesh, made.remat, made.microbatches, made.saved)}; "
                f"{seconds(made.proof.step_seconds)}, {gib(made.proof.peak_bytes)} compiled",
                flush=True,
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())
