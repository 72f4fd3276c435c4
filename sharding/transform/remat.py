"""What each layer keeps for its backward pass: names for its values, and a checkpoint around its body."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from ..errors import UserError, nearest
from ..plans.vocabulary import NAMES
from ..program.jaxpr import Body, Go, Pass, scan_parts
from ..program.layers import INPUT, Marks, is_checkpointed, is_layer_scan, layer_scans
from ..program.program import Equation, Program
from .attention import AttentionKernel

# Place of a kept value → JAX's word for that memory.
PLACES = {"device": "device", "host": "pinned_host"}

# Policy → which results the backward pass keeps, as `jax.checkpoint` understands it; ``none`` is without one.
POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


class Name(Pass):
    """Gives values of layers the names of `marks`, by `jax.ad_checkpoint.checkpoint_name`.

    With `inputs` what layers hand on is named too. What `kernel` keeps under its name gets no second one.
    """

    def __init__(self, marks: Marks, *, inputs: bool, kernel: AttentionKernel | None = None) -> None:
        self._marks = marks
        self._inputs = inputs
        self._kernel = kernel

    def visit(self, equation: Equation, inputs: list[Any], go: Go) -> Sequence[Any]:
        """Name what the equation reads and gives."""
        eqn = equation.eqn
        if self._inputs and is_layer_scan(eqn):
            return go(inputs, _with_named_carry(equation))
        for n, atom in enumerate(eqn.invars):
            name = self._marks.get((equation.index, n))
            if name is not None and (self._kernel is None or not self._kernel.keeps(atom)):
                inputs[n] = checkpoint_name(inputs[n], name)
        outputs = list(go(inputs))
        name = self._marks.get((equation.index, None))
        if name is not None and equation.primitive != "name":
            outputs[0] = checkpoint_name(outputs[0], name)
        return outputs


def _with_named_carry(layers: Equation) -> Callable[[Body], Body]:
    parts = scan_parts(layers.eqn)
    carry = range(parts.num_consts, parts.num_consts + parts.num_carry)

    def around(body: Body) -> Body:
        return lambda args: body(
            [checkpoint_name(value, INPUT) if n in carry else value for n, value in enumerate(args)]
        )

    return around


class Remat(Pass):
    """Puts the body of every layer scan of `program` under `jax.checkpoint`.

    `policy` is ``dots`` (keep the results of products with parameters), ``full`` (keep only each layer's
    input) or ``names``: keep the values that `saved` names, as `Name` or the user has named them, on the
    ``device`` or in the memory of its ``host``. Layers that are under `jax.checkpoint` already are left as
    they are. Raises UserError if there is no layer scan to work on.
    """

    def __init__(self, program: Program, policy: str, saved: Mapping[str, str] | None = None) -> None:
        if policy not in (*POLICIES, NAMES):
            raise UserError(f"remat={policy!r} is not a policy; {nearest(policy, POLICIES)}")
        keep = _named(saved or {}) if policy == NAMES else POLICIES[policy]
        layers = list(layer_scans(program.scope))
        if not layers:
            raise UserError(
                f"remat={policy!r} works on scanned layers and this function has no scan over layers"
            )
        self._layers = {one.index for one in layers if not is_checkpointed(one)}
        self._checkpoint: Callable[[Body], Body] = lambda body: jax.checkpoint(
            body, policy=keep, prevent_cse=False
        )

    def visit(self, equation: Equation, inputs: list[Any], go: Go) -> Sequence[Any]:
        """Checkpoint the body of a layer scan."""
        return go(inputs, self._checkpoint if equation.index in self._layers else None)


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
