"""Random programs in parts, held against the whole batch: what is wrong is reduced to what it takes."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from compared import WRONG, both, difference, told
from interpreted import interpreted
from meshwright.sharding import UserError, declare, plan
from meshwright.sharding.program.jaxpr import Traces
from meshwright.sharding.transform.accumulation.proof import MAX_PASSES, InParts, in_parts
from meshwright.sharding.transform.accumulation.run import Run
from meshwright.sharding.transform.accumulation.values import NotInParts
from random_each import singles
from random_programs import REFUSED, Program, arrays

# Numbers above are no result that can be compared.
_HUGE = 1e12


def tried(seed: int, count: int, door: int, why: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yield what became of each random program, and of those also compiled; count `why` it was refused."""
    tries = _Tries()
    # Not-a-numbers are compared as what they are.
    warnings.simplefilter("ignore", RuntimeWarning)
    due = 0.0
    for number in range(seed, seed + count):
        program = Program(number)
        outcome, line, read = tries.outcome(program)
        if outcome == "refused":
            why[line] += 1
            yield "refused", ""
            # Without the statement that stands in the way the others are tried all the same.
            program, outcome, line, read = tries.accepted(program)
            outcome = f"{outcome}, with less" if outcome in ("exact", "refused") else outcome
        if outcome in ("WRONG", "FAILED"):
            program, line = tries.reduced(program, outcome, line)
        yield told(outcome, f"seed {number}: {line}", only=("WRONG", "FAILED"))
        due += door / count
        if due >= 1 and read is not None and outcome.startswith("exact"):
            due -= 1
            yield from tries.doors(program, read.parts)


def each(names: list[str], seed: int, why: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yield what became of each statement by itself, of the kinds `names` or of all."""
    tries = _Tries()
    warnings.simplefilter("ignore", RuntimeWarning)
    for program in singles(names, tries.shapes, seed):
        outcome, line, _ = tries.outcome(program)
        if outcome == "refused":
            why[line] += 1
        yield told(outcome, f"{program.lines.get(0)}: {line}", only=("WRONG", "FAILED"))


class _Tries:
    """Random programs on the same arrays."""

    def __init__(self) -> None:
        self._arguments = arrays()
        self.shapes = jax.eval_shape(lambda: self._arguments)
        self._flat = jax.tree.leaves(self._arguments)
        self._places = range(len(jax.tree.leaves(self._arguments[0])))

    def outcome(self, program: Program) -> tuple[str, str, InParts | None]:
        """Return what becomes of a program, a line about it, and what was read of it."""
        number = program.seed
        parts = 2 if number % 4 < 2 else 4
        try:
            whole = jax.make_jaxpr(both(program).__wrapped__)(*self.shapes)
        except (*REFUSED, jax.errors.UnexpectedTracerError) as error:
            return "JAX refuses it", str(error)[:100], None
        try:
            read = in_parts(Traces(program).on(*self.shapes), parts, by_block=number % 2 == 0)
            if refused := read.too_many(MAX_PASSES):
                raise refused
        except NotInParts as refused:
            return "refused", refused.reason, None
        except Exception as error:
            return "FAILED", f"reading: {type(error).__name__}: {error}"[:200], None
        try:
            want = interpreted(whole, self._flat)
        except Exception as error:
            return "FAILED", f"not interpreted: {type(error).__name__}: {error}"[:200], None
        try:
            run = Run(read, lambda function, _: function, program)
            in_turn = jax.make_jaxpr(functools.partial(run.value_and_grad, self._places))(*self.shapes)
            got = interpreted(in_turn, self._flat)
        except Exception as error:
            return "FAILED", f"running: {type(error).__name__}: {error}"[:200], read
        return *self._judged(got, want, whole), read

    def _judged(self, got: Sequence[Any], want: Sequence[Any], whole: Any) -> tuple[str, str]:
        apart = difference(got, want)
        if apart < WRONG:
            return ("not a number by either" if np.isnan(want[0]) else "exact"), ""
        largest = max(float(np.max(np.abs(one), initial=0)) for one in want if one.dtype.kind == "f")
        if not largest < _HUGE or self._swayed(whole, want):
            return "rounding decides it", ""
        return "WRONG", f"{apart:.1e}"

    def _swayed(self, whole: Any, want: list[Any]) -> bool:
        """Whether a program gives something else where its drawn numbers differ in their last digits.

        Such as a branch on a sum that is 0 but for rounding: there is no right answer to compare with.
        """
        noise = np.random.default_rng(0)
        for _ in range(12):
            moved = [
                # Ties of whole numbers are meant.
                leaf * (1 + 1e-15 * noise.normal(size=leaf.shape) * (leaf != np.round(leaf)))
                if jnp.issubdtype(leaf.dtype, jnp.floating)
                else leaf
                for leaf in self._flat
            ]
            if difference(interpreted(whole, moved), want) > WRONG:
                return True
        return False

    def accepted(self, program: Program) -> tuple[Program, str, str, InParts | None]:
        """Return a program without one of its statements, that is not refused, and its `outcome`."""
        for number in reversed(range(program.length)):
            less = program.without(number)
            outcome, line, read = self.outcome(less)
            if outcome not in ("refused", "JAX refuses it"):
                return less, outcome, line, read
        return program, "refused", "", None

    def reduced(self, program: Program, outcome: str, line: str) -> tuple[Program, str]:
        """Return the program without what its fault does not take, and how the rest reads."""
        for number in reversed(range(program.length)):
            less = program.without(number)
            if number not in program.skipped and (found := self.outcome(less))[0] == outcome:
                program, line = less, found[1]
        self.outcome(program)
        left = [text for n, text in sorted(program.lines.items()) if n not in program.skipped]
        return program, "\n    ".join([line, *left])

    def doors(self, program: Program, parts: int) -> Iterator[tuple[str, str]]:
        """Yield what `declare` and `plan` make of a program, compiled and run as a user does."""
        want = jax.tree.leaves(both(program)(*self._arguments))
        params, batch, state = self.shapes
        ways: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
            "declared": (declare, {"mesh": {"data": 2}}),
            "planned": (plan, {}),
        }
        for name, (function, more) in ways.items():
            how = {"topology": "cpu:2", "microbatches": parts, "recognise": (), "state": state, **more}
            try:
                made = function(program, params, batch, **how)
            except UserError:
                # By stride, as users' rows go, it may not come in parts where it does by block.
                yield f"{name}: refused", ""
                continue
            apart = difference(jax.tree.leaves(both(made.apply(program))(*self._arguments)), want)
            outcome = f"{name}: {'exact' if apart < WRONG else 'WRONG'}"
            yield told(outcome, f"seed {program.seed}: {apart:.1e}", only=(f"{name}: WRONG",))
