"""Compare two runs bit for bit: `python tests/frozen/losses.py RUN OTHER`, the folders that they wrote.

For the quickstart before and after a change, in a checkout of each:
`meshwright train configs/quickstart.yaml train.steps=10 run=RUN`. Runs are equal to the last bit only on one
processor, one Python (whose library the quickstart learns) and one JAX; what holds everywhere, to a part in a
thousand, is `losses.json`: the first steps of the small run that tests/runtime/train/test_train.py makes.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

LEARNT = ("step", "loss", "grad_norm", "eval_loss", "accuracy")


def learnt(run: pathlib.Path) -> list[dict[str, Any]]:
    """Return what each step of a run found, without times."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: row[key] for key in LEARNT if key in row} for row in map(json.loads, lines)]


def main() -> int:
    """Print the first difference, or how many steps are equal."""
    one, other = (learnt(pathlib.Path(word)) for word in sys.argv[1:])
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            print(f"{sys.argv[1]}: {mine}\n{sys.argv[2]}: {theirs}")
            return 1
    print(f"{min(len(one), len(other))} steps are equal bit for bit; {len(one)} and {len(other)} were made")
    return 0 if one else 1


if __name__ == "__main__":
    sys.exit(main())
