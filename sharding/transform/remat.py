"""Rematerialisation as a transformation: what each scanned layer keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from ..errors import UserError, nearest
from ..plans.vocabulary import NAMES
from ..program import jaxpr as generations
from ..program.jaxpr import evaluate, scan_again
from ..program.layers import is_checkpointed, is_layer_scan

# Place of a kept value → JAX's word for that memory.
PLACES = {"device": "device", "host": "pinned_host"}

# Policy → which results the backward pass keeps, as `jax.checkpoint` understands it; ``none`` is without one.
POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


def remat(
    function: Callable[..., Any], policy: str, saved: Mapping[str, str] | None = None
) -> Callable[..., Any]:
    """Return `function` with the body of every layer scan under `jax.checkpoint`.

    `policy` is ``none`` (keep what JAX keeps), ``dots`` (keep the results of products with parameters),
    ``full`` (keep only each layer's input) or ``names``: keep the values that `saved` names, as
    `name_values` or the user has named them, on the ``device`` or in the memory of its ``host``. A layer scan
    is a `lax.scan` over stacked arrays that holds a matrix product or a convolution; one whose body is under
    `jax.checkpoint` already is left as it is. Raises UserError, when the function is traced, if there is no
    layer scan to work on.
    """
    if policy not in (*POLICIES, NAMES):
        raise UserError(f"remat={policy!r} is not a policy; {nearest(policy, POLICIES)}")
    if policy == "none":
        return function
    keep = _named(saved or {}) if policy == NAMES else POLICIES[policy]

    def wrapped(*args: Any) -> Any:
        found = []

        def visit(equation: core.JaxprEqn, inputs: list[Any]) -> Sequence[Any] | None:
            if equation.primitive.name == "jit":
                return evaluate(generations.closed(equation.params["jaxpr"]), inputs, visit)
            if not is_layer_scan(equation):
                return None
            found.append(equation)
            body = generations.scan_parts(equation).body
            if is_checkpointed(body):
                return None
            return scan_again(
                equation,
                inputs,
                lambda args: evaluate(body, args, lambda *_: None),
                wrap=lambda turn: jax.checkpoint(turn, policy=keep, prevent_cse=False),
            )

        program, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = evaluate(program, jax.tree.leaves(args), visit)
        if not found:
            raise UserError(
                f"remat={policy!r} works on scanned layers and this function has no scan over layers"
            )
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return wrapped


def _named(saved: Mapping[str, str]) -> Callable[..., Any]:
    for name, place in saved.items():
        if place not in PLACES:
            raise UserError(f"{name}: {place!r} is no place to keep a value; {nearest(place, PLACES)}")
    on = {place: [name for name, where in saved.items() if where == place] for place in PLACES}
    if not on["host"]:
        return jax.checkpoint_policies.save_only_these_names(*on["device"])
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=on["device"],
        names_which_can_be_offloaded=on["host"],
        offload_src=PLACES["device"],
        offload_dst=PLACES["host"],
    )
