"""Accumulation against the whole batch: losses of many kinds by both doors, and random programs.

    python benchmarks/accumulation.py [name ...]
    python benchmarks/accumulation.py --random 5000 --seed 10000 --door 200

Each loss is planned and declared with microbatches, and its value, aux and gradients are compared with those
of the whole batch in float64, or it is refused with its line. Random programs go in two or four parts, by
block (even seeds) and by stride. What a step compiles of them, their value and gradients in parts, is traced
and run by NumPy, which costs a hundredth of compiling it; about `--door` of them are also declared on two
devices, compiled and run as a user does. Prints a line for whatever is wrong, and counts.
"""

from __future__ import annotations

import argparse
import functools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import accumulation_losses as kinds
import accumulation_models
import jax
import numpy as np
import random_programs
from interpreted import interpreted
from meshwright.sharding import UserError, declare, plan
from meshwright.sharding.program.jaxpr import Traces
from meshwright.sharding.transform.accumulation.proof import MAX_PASSES, in_parts
from meshwright.sharding.transform.accumulation.run import Run
from meshwright.sharding.transform.accumulation.values import NotInParts

WRONG = 1e-8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="losses; all if not given")
    parser.add_argument("--random", type=int, default=0, help="random programs to try instead")
    parser.add_argument("--seed", type=int, default=5000, help="of the first of them")
    parser.add_argument("--door", type=int, default=0, help="of them, how many to compile and run besides")
    parser.add_argument("--why", action="store_true", help="tell how often they were refused for what")
    parser.add_argument("--parts", type=int, default=4, help="of the losses")
    given = parser.parse_args()
    why = Counter[str]()
    with jax.enable_x64(True):
        found = (
            tried(given.seed, given.random, given.door, why)
            if given.random
            else compared(given.names, given.parts)
        )
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


def tried(seed: int, count: int, door: int, why: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yield what became of each random program, and of those also compiled; count `why` it was refused."""
    arguments = random_programs.arrays()
    shapes = jax.eval_shape(lambda: arguments)
    flat, places = jax.tree.leaves(arguments), range(len(jax.tree.leaves(arguments[0])))
    # Not-a-numbers are compared as what they are.
    warnings.simplefilter("ignore", RuntimeWarning)
    due = 0.0
    for number in range(seed, seed + count):
        loss, parts = random_programs.program(number), 2 if number % 4 < 2 else 4
        try:
            read = in_parts(Traces(loss).on(*shapes), parts, by_block=number % 2 == 0)
            if refused := read.too_many(MAX_PASSES):
                raise refused
        except NotInParts as refused:
            why[refused.reason] += 1
            yield "refused", ""
            continue
        run = Run(read, lambda function, _: function, loss)
        whole = jax.make_jaxpr(both(loss).__wrapped__)(*shapes)
        in_turn = jax.make_jaxpr(functools.partial(run.value_and_grad, places))(*shapes)
        want = interpreted(whole, flat)
        outcome, line = judged("", number, interpreted(in_turn, flat), want)
        if outcome == "WRONG" and swayed(whole, flat, want):
            yield told("rounding decides it", line)
            continue
        yield told(outcome, line, only="WRONG")
        due += 2.5 * door / count
        if due >= 1:
            how = {"topology": "cpu:2", "mesh": {"data": 2}, "microbatches": parts, "recognise": ()}
            try:
                made = declare(loss, *shapes, **how)
            except UserError:
                # By stride, as users' rows go, it may not come in parts where it does by block.
                continue
            due -= 1
            got = jax.tree.leaves(both(made.apply(loss))(*arguments))
            yield told(*judged("compiled, ", number, got, want), only="compiled, WRONG")


def judged(how: str, number: int, got: Any, want: Any) -> tuple[str, str]:
    """Return what became of a random program."""
    apart = difference(got, want)
    outcome = "exact" if apart < WRONG else "WRONG"
    if outcome == "exact" and np.isnan(want[0]):
        outcome = "not a number by either"
    return f"{how}{outcome}", f"seed {number}: {apart:.1e}"


def swayed(whole: Any, flat: list[Any], want: list[Any]) -> bool:
    """Whether a program gives something else where its drawn numbers differ in their last digits.

    Such as a branch on a sum that is 0 but for rounding: there is no right answer to compare with.
    """
    noise = np.random.default_rng(0)
    for _ in range(12):
        moved = [
            # Ties of whole numbers are meant.
            leaf * (1 + 1e-15 * noise.normal(size=leaf.shape) * (leaf != np.round(leaf)))
            for leaf in map(np.asarray, flat)
        ]
        if difference(interpreted(whole, moved), want) > WRONG:
            return True
    return False


def told(outcome: str, line: str, only: str | None = None) -> tuple[str, str]:
    if only in (None, outcome):
        print(f"{outcome:8} {line}"[:240], flush=True)
    return outcome, line


def both(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return the jitted value, aux and gradients of a loss."""

    def function(params: Any, batch: Any) -> Any:
        found = loss(params, batch)
        return found if isinstance(found, tuple) else (found, None)

    def run(params: Any, batch: Any) -> Any:
        (value, aux), gradients = jax.value_and_grad(function, has_aux=True)(params, batch)
        return (value if aux is None else (value, aux)), gradients

    # Numbers are what is looked at, not seconds: a third of the compiler's time is saved.
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def difference(got: Any, want: Any) -> float:
    """Return the largest difference of any array, in parts of its own largest number."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape or a.dtype != b.dtype or not np.array_equal(np.isnan(a), np.isnan(b)):
            return float("inf")
        if not np.issubdtype(a.dtype, np.inexact):
            worst = max(worst, float(not np.array_equal(a, b)))
        elif a.size:
            worst = max(worst, float(np.nanmax(np.abs(a - b)) / max(float(np.nanmax(np.abs(b))), 1e-3)))
    return worst


if __name__ == "__main__":
    main()
