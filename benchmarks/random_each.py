"""Each statement of the tables that random programs are drawn from, by itself, tried one after another."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from random_drawn import Drawn, Value
from random_programs import END, KINDS, REFUSED, WRAPPERS, Program

# Options of a table that are tried at most; a shorter table begins anew.
_MOST = 40


class Single(Program):
    """The loss that takes option `option` of a kind of statement, on one source of what it may work on.

    `source` is the name of a value of examples (``rows``, ``series``), or of what all share (``weights``);
    `wrapper` is what the statement runs in, `end` how the loss ends.
    """

    def __init__(self, kind: str, option: int, source: str, wrapper: str | None, end: str) -> None:
        super().__init__(option)
        self._how = kind, option, source, wrapper, end
        self.length = 0

    def __call__(self, params: Any, batch: Any, state: Any) -> Any:
        kind, option, source, wrapper, end = self._how
        drawn = _Ordered(params, batch, state, option)
        x, rows = params["weights"], batch["rows"]
        if source == "rows":
            x = jnp.tanh(rows @ params["weights"] + params["bias"])
        elif source == "series":
            x = jnp.sin(batch["series"] @ params["weights"])
        y = self._run(drawn, kind, wrapper, x)
        self.lines = {0: f"{kind} {wrapper or ''} of {source}, {end}: {', '.join(drawn.chosen)}"}
        if source == "weights":
            # Elements of what all share, each beside a column.
            y = rows + jnp.resize(y.ravel(), rows.shape[1:])
        loss = END[end](drawn, jnp.sin(rows @ params["weights"]), y)
        return loss, (y.mean(), {**state, "seen": state["seen"] + 1})

    def _run(self, drawn: _Ordered, kind: str, wrapper: str | None, x: Value) -> Value:
        def made(x: Value) -> Value:
            drawn.random = random.Random(kind)
            return KINDS[kind](drawn, x)

        y = made(x) if wrapper is None else WRAPPERS[wrapper](drawn, made, x)
        if y is None:
            raise ValueError("does not fit")
        y = jnp.asarray(y)
        return (y.real if jnp.iscomplexobj(y) else y).astype(x.dtype)


class _Ordered(Drawn):
    """What is drawn from, the same `option` of each table."""

    def __init__(self, params: Any, batch: Any, state: Any, option: int) -> None:
        super().__init__(params, batch, state)
        self._option, self.longest = option, 0

    def choice(self, options: Any) -> Any:
        self.longest = max(self.longest, len(options))
        return super().choice([options[self._option % len(options)]])


def singles(names: list[str], shapes: Any, seed: int) -> Iterator[Single]:
    """Yield programs of each statement of the kinds `names`, or of all: plain, and in something drawn."""
    drawn = random.Random(seed)
    for kind in names or KINDS:
        for option in range(_MOST):
            longest = 0
            for source in ("rows", "series", "weights"):
                longest = max(longest, _longest(kind, option, source, shapes))
                for wrapper in (None, drawn.choice([*WRAPPERS])):
                    yield Single(
                        kind, option, source, wrapper, drawn.choice([*END]) if wrapper else "squares"
                    )
            if option + 1 >= longest:
                break


def _longest(kind: str, option: int, source: str, shapes: Any) -> int:
    """Return how many options the longest table has that a kind chooses from."""
    found: list[int] = []

    def look(params: Any, batch: Any, state: Any) -> Value:
        drawn = _Ordered(params, batch, state, option)
        x = {"rows": batch["rows"], "series": batch["series"], "weights": params["weights"]}[source]
        with contextlib.suppress(REFUSED):
            KINDS[kind](drawn, x)
        found.append(drawn.longest)
        return x

    jax.eval_shape(look, *shapes)
    return found[0]
