"""Models of other people: what is planned of them, and how far small ones are from plain JAX."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from meshwright.sharding import UserError, plan

TOPOLOGIES = ("v5e:4x8", "h100:4x8")
Shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A loss, the shapes of its parameters and of what changes beside them, and what makes both."""

    loss: Callable[..., Any]
    params: Any
    rest: Any
    made: Callable[[], Any]

    def values(self, batch: Any, loss: Callable[..., Any]) -> tuple[float, list[Any]]:
        """Return the value and the gradients of `loss`."""
        params, rest = jax.jit(self.made)()
        others = () if self.rest is None else (rest,)

        def scalar(params: Any, batch: Any, *others: Any) -> Any:
            found = loss(params, batch, *others)
            return found[0] if others else found

        value, gradients = jax.jit(jax.value_and_grad(scalar))(params, batch, *others)
        return float(value), [np.asarray(leaf) for leaf in jax.tree.leaves(gradients)]


def shapes(row: dict[str, tuple[Any, ...]], rows: int) -> dict[str, Any]:
    """Return the batch's shapes; a row's array is given by its sizes, its type and, of integers, how many."""

    def shape(said: tuple[Any, ...]) -> Any:
        place = next(n for n, one in enumerate(said) if isinstance(one, str))
        return Shape((rows, *said[:place]), said[place])

    return {name: shape(said) for name, said in row.items()}


def drawn(row: dict[str, tuple[Any, ...]], rows: int) -> dict[str, Any]:
    """Return a batch of random numbers."""
    generator = np.random.default_rng(0)
    found = {}
    for name, shape in shapes(row, rows).items():
        if jnp.issubdtype(shape.dtype, jnp.integer):
            found[name] = generator.integers(0, row[name][-1], shape.shape).astype(shape.dtype)
        else:
            found[name] = jnp.asarray(generator.normal(size=shape.shape), shape.dtype)
    return found


def planned(name: str, what: Problem, batch: Any) -> Iterator[str]:
    """Yield a line for each topology."""
    elements = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(what.params))
    yield f"{name}: {elements / 1e9:.2f}e9 parameters"
    for topology in TOPOLOGIES:
        start = time.perf_counter()
        try:
            found = plan(
                what.loss,
                what.params,
                batch,
                topology=topology,
                optimizer=optax.adamw(1e-3),
                state=what.rest,
            )
        except UserError as error:
            yield f"  {topology}: {error}"
            continue
        seconds = time.perf_counter() - start
        estimate = found.estimate
        assert estimate is not None
        mesh = " ".join(f"{axis}={size}" for axis, size in found.mesh.items() if size > 1)
        yield (
            f"  {topology}: MFU {estimate.mfu:.1%}, step {estimate.step_seconds:.3f} s, {mesh}, "
            f"remat {found.remat}, microbatches {found.microbatches}, planned in {seconds:.1f} s"
        )
        yield from (f"    {note}" for note in found.notes)


def compared(what: Problem, batch: Any) -> str:
    """Return how far a small model's planned loss and gradients on eight devices are from plain JAX's."""
    found = plan(what.loss, what.params, batch, topology="cpu:8", state=what.rest)
    wanted, expected = what.values(batch, what.loss)
    value, gradients = what.values(batch, found.apply(what.loss))
    scale = max(float(np.abs(leaf).max()) for leaf in expected)
    worst = max(float(np.abs(one - two).max()) for one, two in zip(gradients, expected, strict=True)) / scale
    return f"  small, on eight devices: loss {value:.6f}, plain {wanted:.6f}; gradients within {worst:.1e}"
