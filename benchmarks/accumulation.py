"""Accumulation against the whole batch: losses of many kinds by both doors, and random programs.

    python benchmarks/accumulation.py [name ...]
    python benchmarks/accumulation.py --random 5000 --seed 10000 --door 200
    python benchmarks/accumulation.py --each [kind ...]

Each loss is planned and declared with microbatches, and its value, aux and gradients are compared with those
of the whole batch in float64, or it is refused with its line. Random programs go in two or four parts, by
block (even seeds) and by stride, and without one of their statements where they are refused; `--each` tries
the statements that they are made of one by one. What a step compiles of them, their value and gradients in
parts, is traced and run by NumPy, which costs a hundredth of compiling it; about `--door` of them are also
declared and planned on two devices, compiled and run as a user does. Prints a line for what is wrong, with
the statements that it takes, and counts.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import accumulation_losses as kinds
import accumulation_models
import jax
from compared import WRONG, both, difference, told
from meshwright.sharding import UserError, declare, plan
from random_accumulation import each, tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="losses; all if not given")
    parser.add_argument("--random", type=int, default=0, help="random programs to try instead")
    parser.add_argument("--each", action="store_true", help="each statement of random programs, by `names`")
    parser.add_argument("--seed", type=int, default=5000, help="of the first of them")
    parser.add_argument("--door", type=int, default=0, help="of them, how many to compile and run besides")
    parser.add_argument("--why", action="store_true", help="tell how often they were refused for what")
    parser.add_argument("--parts", type=int, default=4, help="of the losses")
    given = parser.parse_args()
    why = Counter[str]()
    with jax.enable_x64(True):
        if given.each:
            found = each(given.names, given.seed, why)
        elif given.random:
            found = tried(given.seed, given.random, given.door, why)
        else:
            found = compared(given.names, given.parts)
        counts = Counter(outcome for outcome, _ in found)
    for reason, times in why.most_common() if given.why else ():
        print(f"{times:5} {reason}")
    print(dict(counts))


def compared(names: list[str], parts: int) -> Iterator[tuple[str, str]]:
    """Yield what became of each loss by each door, ``exact``, ``refused`` or ``WRONG``."""
    params, batch = kinds.params(), kinds.batch()
    shapes = jax.eval_shape(lambda: params), jax.eval_shape(lambda: batch)
    losses = kinds.losses(kinds) | kinds.losses(accumulation_models)
    for name, loss in losses.items():
        if names and name not in names:
            continue
        want = both(loss)(params, batch)
        for door in ("declare", "plan"):
            more = {"mesh": {"data": 8}} if door == "declare" else {}
            try:
                made = {"declare": declare, "plan": plan}[door](
                    loss, *shapes, topology="cpu:8", microbatches=parts, recognise=(), **more
                )
            except UserError as error:
                known = "at " in str(error) and ".py:" in str(error)
                yield told("refused" if known else "REFUSED WITHOUT A LINE", f"{door} {name}: {error}")
                continue
            apart = difference(both(made.apply(loss))(params, batch), want)
            outcome = "exact" if apart < WRONG else "WRONG"
            passes = next((note for note in made.notes if "passes" in note), "")
            yield told(outcome, f"{door} {name}: {apart:.1e} {passes}")


if __name__ == "__main__":
    main()
