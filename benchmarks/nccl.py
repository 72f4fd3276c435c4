"""An all-reduce over a host's NVIDIA GPUs: what a plan's estimate says beside what was measured.

`python benchmarks/nccl.py CSV [--topology h100:8]` reads the columns `bytes` and `time_us` of nccl-tests. It
prints a row a size, and the median and the worst error from 1 MiB on. Of rows that `sharding/cost/nccl.toml`
was made with this says how well they are followed, of others how well it holds.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from meshwright.sharding import Topology
from meshwright.sharding.cost.calibration import calibration_for
from meshwright.sharding.cost.collectives import links


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("--topology", default="h100:8")
    given = parser.parse_args()
    topology = Topology.parse(given.topology)
    record = calibration_for(topology.chip.name)
    (link,) = links({"data": topology.num_devices}, topology, record).values()
    errors = []
    print(f"{'bytes':>14} {'measured us':>12} {'estimated us':>12}  error")
    with open(given.file, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            size, measured = int(row["bytes"]), float(row["time_us"])
            estimated = 1e6 * link.collective("all_reduce", size)
            error = estimated / measured - 1.0
            print(f"{size:>14,} {measured:>12.1f} {estimated:>12.1f} {error:>+6.0%}")
            errors += [abs(error)] if size >= 2**20 else []
    print(f"from 1 MiB on: median {statistics.median(errors):.1%}, worst {max(errors):.1%}")


if __name__ == "__main__":
    main()
