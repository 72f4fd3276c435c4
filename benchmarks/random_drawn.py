"""What a random program draws from: its arguments, and the values that it made so far.

Sizes coincide on purpose: there are as many rows as columns, and the steps of a series come in as many parts,
so that nothing can be told apart by its size.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

ROWS, TIME, WIDTH, CLASSES = 8, 4, 8, 4

Value = Any
#: Makes a value of another; None, or JAX's exception, where it does not fit.
Maker = Callable[["Drawn", Value], "Value | None"]
#: Makes a value by a function of another: in a loop, behind a checkpoint, for each row.
Wrapper = Callable[["Drawn", Callable[[Value], Value], Value], "Value | None"]


def arrays() -> tuple[dict[str, Value], dict[str, Value], dict[str, Value]]:
    """Return parameters, a batch and a state."""
    keys = iter(jax.random.split(jax.random.key(11), 12))

    def normal(*shape: int) -> Value:
        return 0.7 * jax.random.normal(next(keys), shape)

    params = {
        "bias": normal(WIDTH),
        "table": normal(TIME, WIDTH),
        "weights": normal(WIDTH, WIDTH),
        "scale": normal(),
    }
    batch = {
        "rows": normal(ROWS, WIDTH),
        "series": normal(ROWS, TIME, WIDTH),
        "shares": jnp.abs(normal(ROWS)),
        "ids": jax.random.randint(next(keys), (ROWS, TIME), 0, CLASSES),
        "counts": (jnp.arange(TIME) < (jnp.arange(ROWS) * 3 % (TIME + 1))[:, None]) * 1.0,
        "common": jnp.linspace(0.5, 1.5, TIME),
        "keys": jax.random.split(next(keys), ROWS),
        "key": next(keys),
    }
    return params, batch, {"average": normal(WIDTH), "seen": jnp.int32(3)}


class Drawn:
    """Random numbers, the arguments of a program, and the values that it made so far."""

    def __init__(self, params: dict[str, Value], batch: dict[str, Value], state: dict[str, Value]) -> None:
        self.random, self.chosen = random.Random(0), list[str]()
        self.params, self.batch, self.state = params, batch, state
        self.pool: list[Value] = [*params.values(), *(batch[n] for n in ("rows", "series", "shares"))]
        self.pool += [batch["counts"], batch["common"], state["average"]]
        self.pool.append(jnp.tanh(batch["rows"] @ params["weights"] + params["bias"]))
        self.pool.append(jnp.sin(batch["series"] @ params["weights"]))
        self.pool.append(batch["shares"] * (batch["rows"] @ params["bias"]))
        self.pool.append(params["table"][batch["ids"]] * params["scale"])

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def choice(self, options: Any) -> Any:
        found = self.random.choice(options)
        code = getattr(found, "__code__", None)
        name = getattr(found, "__name__", str(found) if isinstance(found, str) else "")
        if code is not None and name == "<lambda>":
            name = f"{Path(code.co_filename).name}:{code.co_firstlineno}"
        self.chosen += [name] if name else []
        return found

    def axis(self, x: Value) -> int:
        return self.random.randrange(x.ndim)

    def like(self, fits: Callable[[Value], bool]) -> Value | None:
        found = [one for one in self.pool if fits(one)]
        return self.choice(found) if found else None

    def fitting(self, x: Value) -> Value:
        """Return a value that broadcasts over `x`."""
        return self.like(lambda y: y.ndim == 0 or x.shape[-y.ndim :] == y.shape)
