"""Memory of a planned training step on one of 8 simulated devices over that of the unsharded one.

    python benchmarks/memory_share.py [MODEL]... [--scale N] [--json]

The models are those of tests/zoo, which nobody annotated, at a scale where parameters weigh; XLA's CPU
compiler says what arguments, results and temporaries take. An eighth is 0.125.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def main() -> None:
    """Print a line for each model, or all as JSON."""
    from meshwright.runtime import simulate

    simulate(8)
    import zoo
    from compiled_memory import measure

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(zoo.MODELS))
    parser.add_argument("--scale", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = []
    for name in given.models:
        rows.append(row := measure(name, given.scale))
        if not given.json:
            mesh = " x ".join(f"{axis}={size}" for axis, size in row["mesh"].items())
            print(
                f"{name:20} {row['parameters'] / 1e6:8.2f} M  {row['unsharded_bytes'] / 2**20:8.1f} MiB  "
                f"{row['device_bytes'] / 2**20:8.1f} MiB  {row['share']:.3f}  replicated "
                f"{row['replicated']:.2%}  {mesh}",
                flush=True,
            )
    if given.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
