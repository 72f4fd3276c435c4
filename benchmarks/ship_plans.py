"""Plan, prove and write configs/plans, or check them: `benchmarks/ship_plans.py [--check] [--only WORD] …`.

Each config is planned for each of its slices, compiled whole by the real compiler and saved with its proof,
as CONFIG.TOPOLOGY.plan.json; with --top N it is the fastest of so many by the compiler's word, as that of
`meshwright plan --verify --top N`. --with compiles with one set of its chip's options (options.toml), where
trying them all takes too long. A config is trained by one with `plan=configs/plans/…`.

With --check nothing is written: each saved plan is compiled again as it stands, and its peak and seconds are
held against those of its proof. What differs by more than 1 %, does not fit or is gone is said and counted in
the exit status. Where a search takes another layout now, a line says which, and that is no failure: estimates
are near each other, and a saved plan was compiled.
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
from meshwright.runtime.train.planning import Planned
from meshwright.sharding import Plan, Topology, UserError
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
    "deepseek-v3": ("h100:256x8", "v5p:8x8x16"),
}
# What is declared of plans that no search would take: stages where others are faster, and what fits as
# compiled by less than an allocator usually leaves free.
DECLARED = {
    ("llama3-405b", "8*v5p:4x4x8"): ("mesh={stage: 8}",),
    ("llama3-405b", "2*v6e:16x16"): ("mesh={data: 2, fsdp: 64, tensor: 4}", 'remat={"layer:in": host}'),
}
# Of a proof's figures: by so much another run of the same compiler may differ.
_ALIKE = 0.01


def path_of(config: str, topology: str) -> Path:
    """Return where the plan of a config for a topology stands."""
    return _CONFIGS / "plans" / f"{config}.{topology.replace(':', '-').replace('*', 'x')}.plan.json"


def _options(name: str, topology: str) -> Options:
    sets = {trial.name: trial.options for trial in trials_for(Topology.parse(topology))}
    if name not in sets:
        raise UserError(f"{topology} has no options {name!r}; it has {', '.join(sets) or 'none'}")
    return sets[name]


def _planned(config: str, topology: str, *more: str) -> Planned:
    words = (f"topology={topology}", *DECLARED.get((config, topology), ()), *more)
    return plan_config(load(_CONFIGS / f"{config}.yaml", words))


def _write(config: str, topology: str, top: int, options: str) -> str:
    planned = _planned(config, topology)
    if options:
        chosen = dataclasses.replace(planned.plan, compiler_options=_options(options, topology))
        planned = dataclasses.replace(planned, plan=chosen)
    made = planned.verified(top).plan
    made.save(path_of(config, topology))
    return f"{_layout(made)}; {_compiled(made)}"


def _check(config: str, topology: str) -> str:
    """Return what a saved plan compiles to; raise UserError where that is not what its proof says."""
    path = path_of(config, topology)
    if not path.exists():
        raise UserError(f"there is no {path.name}; write it with --only {path.name}")
    saved = plan_config(load(_CONFIGS / f"{config}.yaml", [f"plan={path}", f"topology={topology}"]))
    again = saved.verified().plan
    if saved.plan.proof is None:
        raise UserError("it was saved without a proof")
    for what, old, new in _figures(saved.plan, again):
        if abs(new - old) > _ALIKE * old:
            raise UserError(f"its proof says {what} {old:.4g}, and it compiles to {new:.4g} now")
    found = _planned(config, topology).plan
    same = found.mesh == again.mesh and _layout(found) == _layout(again)
    said = "" if same else f"; a search takes {_layout(found)} now"
    return f"{_compiled(again)}, as its proof says{said}"


def _figures(saved: Plan, again: Plan) -> list[tuple[str, float, float]]:
    assert saved.proof is not None
    assert again.proof is not None
    return [
        ("seconds a step", saved.proof.step_seconds, again.proof.step_seconds),
        ("bytes at most", saved.proof.peak_bytes, again.proof.peak_bytes),
    ]


def _layout(plan: Plan) -> str:
    return layout_in_words(plan.mesh, plan.remat, plan.microbatches, plan.saved)


def _compiled(plan: Plan) -> str:
    assert plan.proof is not None
    return f"{seconds(plan.proof.step_seconds)}, {gib(plan.proof.peak_bytes)} compiled"


def main() -> int:
    """Write or check each plan, and say what it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="compile the saved plans again and write nothing"
    )
    parser.add_argument("--only", default="", help="plans whose file's name contains this")
    parser.add_argument("--top", type=int, default=1, help="plans to compile and choose from")
    parser.add_argument("--with", dest="options", default="", help="a set of options to compile with")
    given = parser.parse_args()
    if given.check and (given.top != 1 or given.options):
        parser.error("--check compiles the saved plans as they stand; leave out --top and --with")
    all_of_them = [(config, topology) for config, topologies in SHIPPED.items() for topology in topologies]
    chosen = [one for one in all_of_them if given.only in path_of(*one).name]
    if not chosen:
        names = ", ".join(path_of(*one).name for one in all_of_them)
        parser.error(f"--only {given.only!r} is in no file's name; there are {names}")
    failed = 0
    for one in chosen:
        try:
            said = _check(*one) if given.check else _write(*one, given.top, given.options)
        except UserError as error:
            failed, said = failed + 1, str(error)
        print(f"{path_of(*one).name}: {said}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
