"""Which experts a program's routers choose for its tokens, read while the plain function runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import io_callback

from ..ops.experts import experts_call
from ..program.jaxpr import Go, Pass, Traces
from ..program.program import Equation
from .compose import composed

# The operand of a call of experts that says which are chosen.
_CHOSEN = 2


class _Told(Pass):
    """Hands the choices of every call of experts to `take`, in the order in which they are made."""

    def __init__(self, take: Callable[[np.ndarray], None]) -> None:
        self._take = take

    def visit(self, equation: Equation, inputs: list[Any], go: Go) -> Sequence[Any]:
        if experts_call(equation.eqn) is not None:
            io_callback(self._take, None, inputs[_CHOSEN], ordered=True)
        return go(inputs)


def chosen_experts(loss: Callable[..., Any], *args: Any) -> list[np.ndarray]:
    """Return the experts of each call of `ops.experts` in `loss`, int32 ``[batch, sequence, choices]``.

    Layers in a scan call once a turn. The loss is run as it is written, on the device of `args`.

    >>> import jax.numpy as jnp
    >>> from meshwright.sharding.ops.experts import experts
    >>> def loss(params, x):
    ...     weights, chosen = jax.lax.top_k(x @ params["router"], 1)
    ...     return experts(x, weights, chosen, up=params["up"], down=params["up"].mT).sum()
    >>> params = {"router": jnp.eye(2), "up": jnp.ones((2, 2, 4))}
    >>> chosen_experts(loss, params, jnp.array([[[1.0, 0.0], [0.0, 1.0]]]))[0].tolist()
    [[[0], [1]]]
    """
    found: list[np.ndarray] = []
    run = composed(
        Traces(loss), lambda program, params, *state: [_Told(lambda one: found.append(np.asarray(one)))]
    )
    jax.block_until_ready(jax.jit(run)(*args))
    jax.effects_barrier()
    return found


def other_choices(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> tuple[int, int]:
    """Return for how many tokens of calls two functions choose other experts, and of how many there are."""
    pairs = [(np.sort(a, axis=-1), np.sort(b, axis=-1)) for a, b in zip(one, other, strict=True)]
    return sum(int((a != b).any(axis=-1).sum()) for a, b in pairs), sum(a[..., 0].size for a, _ in pairs)
