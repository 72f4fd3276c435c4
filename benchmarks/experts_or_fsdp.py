"""Whether the cost shards a mixture's experts, by hardware: DeepSeek-V3 on TPUs and on NVLink domains of 72.

    python benchmarks/experts_or_fsdp.py [TOPOLOGY=ROWS …]

For each topology and batch prints the seconds of the fastest plan with no axis for experts, of the fastest
with each size of one, and which the search takes. Nothing is told of the hardware but what chips.toml has of
links and domains. Without arguments: tpu7x:8x8x8, where published runs store parameters in parts and gather
them, and racks of GB200 and hosts of H100, where they exchange tokens.
"""

from __future__ import annotations

import pathlib
import sys

from meshwright.runtime.config import load
from meshwright.runtime.train import plan_config
from meshwright.sharding import Plan, UserError

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "deepseek-v3.yaml"
CASES = ("tpu7x:8x8x8=4096", "gb200:64x4=4096", "h100:256x8=8192")
SIZES = (1, 4, 8, 16, 32, 64, 128, 256)


def planned(topology: str, rows: int, *words: str) -> Plan:
    settings = load(CONFIG, [f"topology={topology}", f"train.global_batch={rows}", *words])
    return plan_config(settings).plan


def described(plan: Plan) -> str:
    estimate = plan.estimate
    assert estimate is not None
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)
    return (
        f"{estimate.step_seconds:.2f} s, {estimate.mfu:.1%}  {mesh}, microbatches={plan.microbatches}, "
        f"remat={plan.remat}"
    )


def main() -> None:
    for case in sys.argv[1:] or CASES:
        topology, _, rows = case.rpartition("=")
        found = planned(topology, int(rows))
        print(f"{topology}, {rows} rows of 4,096 tokens; searched: {described(found)}", flush=True)
        for size in SIZES:
            try:
                said = described(planned(topology, int(rows), f"mesh={{expert: {size}}}"))
            except UserError as error:
                said = str(error)[:150]
            print(f"  expert={size:<5} {said}", flush=True)


if __name__ == "__main__":
    main()
