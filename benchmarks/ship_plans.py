"""Plan, prove and write configs/plans: `benchmarks/ship_plans.py [--only WORD] [--top N] [--with SET]`.

Each config is planned for each of its slices, compiled whole by the real compiler and saved with its proof,
as CONFIG.TOPOLOGY.plan.json; with --top N it is the fastest of so many by the compiler's word, as that of
`meshwright plan --verify --top N`. --with compiles with one set of its chip's options (options.toml), where
trying them all takes too long. A config is trained by one with `plan=configs/plans/…`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from meshwright.runtime.config import load
from meshwright.runtime.train import plan_config
from meshwright.sharding import Topology, UserError
from meshwright.sharding.words import gib, layout_in_words, seconds
from meshwright.sharding.xla.options import Options, trials_for

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = {
    "llama3-8b": ("v5e:16x16", "v6e:16x16", "v5p:4x4x8", "h100:4x8"),
    "llama3-8b-1m": ("v5p:8x8x8",),
    "llama3-70b": ("v5p:8x8x8", "v6e:16x16", "h100:32x8"),
    "llama3-70b-128k": ("h100:32x8",),
    "llama3-405b": ("v5p:8x8x16", "2*v6e:16x16", "8*v5p:4x4x8"),
    "mixtral-8x7b": ("v5p:4x4x8",),
    "deepseek-v3": ("h100:256x8",),
}
# What is declared of plans that no search would take.
DECLARED = {("llama3-405b", "8*v5p:4x4x8"): ("mesh={stage: 8}",)}


def path_of(config: str, topology: str) -> Path:
    """Return where the plan of a config for a topology stands."""
    return _CONFIGS / "plans" / f"{config}.{topology.replace(':', '-').replace('*', 'x')}.plan.json"


def _options(name: str, topology: str) -> Options:
    sets = {trial.name: trial.options for trial in trials_for(Topology.parse(topology))}
    if name not in sets:
        raise UserError(f"{topology} has no options {name!r}; it has {', '.join(sets) or 'none'}")
    return sets[name]


def main() -> int:
    """Write each plan and say what it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="plans whose file's name contains this")
    parser.add_argument("--top", type=int, default=1, help="plans to compile and choose from")
    parser.add_argument("--with", dest="options", default="", help="a set of options to compile with")
    given = parser.parse_args()
    only, failed = given.only, 0
    for config, topologies in SHIPPED.items():
        for topology in topologies:
            path = path_of(config, topology)
            if only not in path.name:
                continue
            try:
                words = [f"topology={topology}", *DECLARED.get((config, topology), ())]
                planned = plan_config(load(_CONFIGS / f"{config}.yaml", words))
                if given.options:
                    options = _options(given.options, topology)
                    chosen = dataclasses.replace(planned.plan, compiler_options=options)
                    planned = dataclasses.replace(planned, plan=chosen)
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
