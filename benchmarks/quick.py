"""Quick proofs beside whole ones: `python benchmarks/quick.py [--only WORD]`.

Each shipped plan for TPUs is verified again as `meshwright plan --verify --quick` does, and set beside its
proof, which was made by compiling it whole: seconds to the answer, bytes at most, seconds a step, and the
collectives that move more than a hundredth of all bytes. The seconds of a whole compile are those of the
machine and the day that it was made on. The exit code counts plans whose peaks differ by more than 1 % or
whose collectives are others: those whose proofs are of another program than the step is now.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import ship_plans
from meshwright.runtime.config import load
from meshwright.runtime.train import plan_config
from meshwright.sharding import Topology, UserError
from meshwright.sharding.plans.proof import Proof
from meshwright.sharding.verify.scheduled import shows_schedule

# Of bytes at most: what the compiler's figure counts and a replay of its buffers does not.
_ALIKE = 0.01
# Of all bytes that collectives move: what counts as one of them.
_WORTH = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
    """The whole proof that a plan was shipped with, a quick one, and the seconds that this took."""

    whole: Proof
    quick: Proof
    seconds: float

    @property
    def peak(self) -> float:
        """By how much the quick proof's bytes at most are above the whole one's, as a share."""
        return self.quick.peak_bytes / self.whole.peak_bytes - 1

    @property
    def step(self) -> float:
        """The same of the seconds a step."""
        return self.quick.step_seconds / self.whole.step_seconds - 1

    @property
    def others(self) -> list[str]:
        """Collectives that only one of the two has."""
        found = set()
        for one, other in ((self.whole, self.quick), (self.quick, self.whole)):
            found |= kinds(one, _WORTH) - kinds(other)
        return sorted(f"{kind}/{'×'.join(axes)}" for kind, axes in found)

    @property
    def alike(self) -> bool:
        """Whether both are of the same program."""
        return self.quick.quick and abs(self.peak) <= _ALIKE and not self.others


def kinds(proof: Proof, share: float = 0.0) -> set[tuple[str, tuple[str, ...]]]:
    """Return kind and axes of the collectives that move more than a `share` of all bytes."""
    total = sum(row.bytes for row in proof.collectives)
    return {(row.kind, row.axes) for row in proof.collectives if row.bytes > share * total}


def shipped() -> list[tuple[str, str]]:
    """Return config and topology of the shipped plans whose compiler shows what it scheduled."""
    return [
        (config, topology)
        for config, topologies in ship_plans.SHIPPED.items()
        for topology in topologies
        if shows_schedule(Topology.parse(topology))
    ]


def beside(config: str, topology: str) -> Beside:
    """Verify a shipped plan quickly; raise UserError where it does not fit any more."""
    path = ship_plans.path_of(config, topology)
    made = plan_config(load(path.parents[1] / f"{config}.yaml", [f"plan={path}", f"topology={topology}"]))
    shapes, whole, start = made.shapes, made.plan.proof, time.perf_counter()
    program = (shapes.loss, shapes.params, shapes.batch, made.optimizer)
    quick = made.plan.verify(*program, state=shapes.state, quick=True, use_cache=False).proof
    assert whole is not None
    assert quick is not None
    return Beside(whole=whole, quick=quick, seconds=time.perf_counter() - start)


def main() -> int:
    """Print a row for each shipped plan for TPUs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="plans whose file's name contains this")
    only = parser.parse_args().only
    print(f"{'plan':28} {'quick s':>7} {'whole s':>9} {'peak':>9} {'step':>8}")
    failed = 0
    for one in shipped():
        name = ship_plans.path_of(*one).name.removesuffix(".plan.json")
        if only not in name:
            continue
        try:
            row = beside(*one)
        except UserError as error:
            failed += 1
            print(f"{name:28} {error}", flush=True)
            continue
        failed += not row.alike
        told = f"  other collectives: {', '.join(row.others)}" if row.others else ""
        figures = f"{row.seconds:7.0f} {row.whole.compile_seconds:9.0f} {row.peak:9.2%} {row.step:8.1%}"
        print(f"{name:28} {figures}{told}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
