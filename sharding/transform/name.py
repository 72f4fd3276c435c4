"""Names for the values of layers, as a transformation, so that rematerialisation can be told what to keep."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from ..errors import UserError, nearest
from ..ops.attention import attention_call
from ..program import jaxpr as generations
from ..program.jaxpr import evaluate, run, scan_again
from ..program.layers import INPUT, is_layer_scan, saved_values
from ..program.program import Equation, Scope
from ..program.tracing import read


def name_values(loss: Callable[[Any, Any], Any], names: Collection[str]) -> Callable[[Any, Any], Any]:
    """Return `loss(params, batch)` with `jax.ad_checkpoint.checkpoint_name` on the values that `names` says.

    The names are those of `meshwright.sharding.program.layers`. Raises UserError, when the function is
    traced, for a name that no layer of it has.
    """

    def named(params: Any, batch: Any) -> Any:
        program, shape = jax.make_jaxpr(loss, return_shape=True)(params, batch)
        traced = read(program, (params, batch), shape)
        places = saved_values(traced)
        for name in names:
            if name not in places and name != INPUT:
                raise UserError(f"no layer has a value named {name!r}; {nearest(name, [*places, INPUT])}")
        marks: dict[tuple[int, int | None], str] = {
            (value.equation, value.operand): name for name, value in places.items() if name in names
        }
        walk = _Walk(marks, INPUT in names)
        outputs = walk.scope(program.consts, traced.scope, jax.tree.leaves((params, batch)))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return named


class _Walk:
    def __init__(self, marks: dict[tuple[int, int | None], str], inputs: bool) -> None:
        self._marks = marks
        self._inputs = inputs

    def scope(self, consts: Sequence[Any], scope: Scope, args: Sequence[Any]) -> list[Any]:
        """Evaluate a scope's program with names."""
        equations = {id(equation.eqn): equation for equation in scope.equations}
        program = core.ClosedJaxpr(scope.jaxpr, consts)
        return evaluate(program, args, lambda eqn, inputs: self._visit(equations[id(eqn)], inputs))

    def _visit(self, equation: Equation, inputs: list[Any]) -> Sequence[Any] | None:
        eqn = equation.eqn
        # A call of attention stays one, for the kernel that a plan may have for it.
        if eqn.primitive.name == "jit" and attention_call(eqn) is None:
            consts = generations.closed(eqn.params["jaxpr"]).consts
            return self.scope(consts, equation.scopes[0], inputs)
        if is_layer_scan(eqn):
            return self._layers(equation, inputs)
        result = self._marks.get((equation.index, None))
        operands = {n: name for n in range(len(inputs)) if (name := self._marks.get((equation.index, n)))}
        if result is None and not operands:
            return None
        values = [
            checkpoint_name(value, operands[n]) if n in operands else value for n, value in enumerate(inputs)
        ]
        outputs = list(run(eqn, values))
        if result is not None and eqn.primitive.name != "name":
            outputs[0] = checkpoint_name(outputs[0], result)
        return outputs

    def _layers(self, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
        parts = generations.scan_parts(equation.eqn)
        carry = range(parts.num_consts, parts.num_consts + parts.num_carry)

        def body(args: list[Any]) -> list[Any]:
            if self._inputs:
                rows = enumerate(args)
                args = [checkpoint_name(value, INPUT) if n in carry else value for n, value in rows]
            return self.scope(parts.body.consts, equation.scopes[0], args)

        return scan_again(equation.eqn, inputs, body)
