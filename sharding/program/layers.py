"""The layers of a program: the loops over them, and the values of a layer that a backward pass may keep.

A layer scan is a `lax.scan` that holds a matrix product or a convolution: over stacked arrays, or again and
again with the same ones, as layers do that share their parameters. Its values have names that need no
annotation: the result of a product with a parameter is named after the parameter (``mlp/up``); what goes into
such a product out of work that has no name of its own, as attention's result does, after it and ``:in``
(``attention/output:in``); what the layers hand on is ``layer:in``. Names that the user gave with
`jax.ad_checkpoint.checkpoint_name` are kept.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jax.extend import core

from ..errors import UserError, nearest
from .jaxpr import scan_parts
from .primitives import Trait, primitives
from .program import Equation, Program, Scope
from .stacks import is_stack, path_of_stack

INPUT = "layer:in"

# (An equation's index, one of its operands or None for its first result) → the name of that value.
Marks = Mapping[tuple[int, int | None], str]

_PRODUCTS = primitives(Trait.PRODUCT)
_CHECKPOINTS = primitives(Trait.CHECKPOINT)
# What a parameter goes through and is still itself.
_VIEWS = primitives(Trait.VIEW)


def layer_scans(scope: Scope) -> Iterator[Equation]:
    """Yield the layer scans of a scope and of the jitted calls in it."""
    for equation in scope.equations:
        if equation.primitive == "jit":
            for inner in equation.scopes:
                yield from layer_scans(inner)
        elif is_layer_scan(equation.eqn):
            yield equation


def is_layer_scan(equation: core.JaxprEqn) -> bool:
    """Whether it is a `lax.scan` that holds a matrix product or a convolution."""
    if equation.primitive.name != "scan" or equation.params["length"] < 2:
        return False
    return works(scan_parts(equation).body.jaxpr)


def cuts_beside(layers: int, stages: int, chunks: int) -> bool:
    """Whether stages of so many chunks cut a stack of layers that is not the one with most parameters.

    Two of its layers are on each stage at least, and one in each chunk: fewer are worked through by rows.
    """
    return layers >= max(2, chunks) * stages


def is_checkpointed(layers: Equation) -> bool:
    """Whether the body of a layer scan is under `jax.checkpoint` already: all of its products are."""
    body = layers.scopes[0].equations
    return not any(_multiplies(one.eqn) for one in body if one.primitive not in _CHECKPOINTS)


def works(jaxpr: Any) -> bool:
    """Whether a program holds a matrix product or a convolution."""
    return any(_multiplies(equation) for equation in jaxpr.eqns)


def _multiplies(equation: core.JaxprEqn) -> bool:
    return equation.primitive.name in _PRODUCTS or any(
        works(inner) for inner in core.jaxprs_in_params(equation.params)
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SavedValue:
    """The first result of an equation, or one of its operands; `equation` is its index."""

    equation: int
    operand: int | None = None


def saved_values(program: Program) -> Mapping[str, SavedValue]:
    """Return name → value for the layers of `program`; `INPUT`, which any layer has, is not among them."""
    paths = {
        var: argument.path
        for argument, var in zip(program.arguments, program.jaxpr.jaxpr.invars, strict=True)
        if argument.is_parameter
    }
    found = list(_outside(program.scope, paths))
    names = _shortened([name for name, _ in found])
    return {name: value for name, (_, value) in zip(names, found, strict=True)}


def marks_of(program: Program, names: Collection[str]) -> Marks:
    """Return where in `program` the values are that `names` says, as `saved_values` calls them.

    Raises UserError for a name that no layer has.
    """
    places = saved_values(program)
    for name in names:
        if name not in places and name != INPUT:
            raise UserError(f"no layer has a value named {name!r}; {nearest(name, [*places, INPUT])}")
    return {(value.equation, value.operand): name for name, value in places.items() if name in names}


def _outside(scope: Scope, paths: dict[Any, str]) -> Iterator[tuple[str, SavedValue]]:
    for equation in scope.equations:
        if is_stack(equation.eqn):
            if all(_is_known(atom, paths) for atom in equation.eqn.invars):
                found = path_of_stack([paths[atom] for atom in equation.eqn.invars])
                paths[equation.eqn.outvars[0]] = found
        elif equation.primitive == "jit" and equation.scopes:
            yield from _outside(equation.scopes[0], _passed(equation, paths))
        elif is_layer_scan(equation.eqn):
            yield from _layer(equation.scopes[0], _passed(equation, paths))
        elif equation.primitive in _VIEWS and _is_known(equation.eqn.invars[0], paths):
            paths[equation.eqn.outvars[0]] = paths[equation.eqn.invars[0]]


def _passed(equation: Equation, paths: Mapping[Any, str]) -> dict[Any, str]:
    """Return the paths of the parameters that go into an equation's scope."""
    pairs = zip(equation.scopes[0].jaxpr.invars, equation.eqn.invars, strict=True)
    return {inner: paths[outer] for inner, outer in pairs if _is_known(outer, paths)}


def _is_known(atom: Any, paths: Mapping[Any, str]) -> bool:
    return not isinstance(atom, core.Literal) and atom in paths


def _layer(scope: Scope, paths: dict[Any, str]) -> Iterator[tuple[str, SavedValue]]:
    makers: dict[Any, Equation] = {}
    named: set[Any] = set()
    for equation in scope.equations:
        eqn = equation.eqn
        ins = [atom for atom in eqn.invars if not isinstance(atom, core.Literal)]
        makers.update(dict.fromkeys(eqn.outvars, equation))
        if equation.primitive == "name":
            named.update(eqn.outvars)
            yield eqn.params["name"], SavedValue(equation=equation.index)
        elif equation.primitive == "jit" and equation.scopes:
            yield from _layer(equation.scopes[0], _passed(equation, paths))
        elif equation.primitive in _VIEWS and ins and ins[0] in paths:
            paths[eqn.outvars[0]] = paths[ins[0]]
        elif equation.primitive in _PRODUCTS:
            weights = [atom for atom in ins if atom in paths]
            if len(weights) != 1:
                continue
            name = paths[weights[0]]
            named.update(eqn.outvars)
            yield name, SavedValue(equation=equation.index)
            place, operand = next((n, atom) for n, atom in enumerate(eqn.invars) if atom is not weights[0])
            if not isinstance(operand, core.Literal) and _from_work(operand, makers, named):
                yield f"{name}:in", SavedValue(equation=equation.index, operand=place)


def _from_work(atom: Any, makers: Mapping[Any, Equation], named: set[Any]) -> bool:
    """Whether a value comes, but for cheap work, out of products that have no name."""
    seen: set[Any] = set()
    left = [atom]
    while left:
        one = left.pop()
        if isinstance(one, core.Literal) or one in seen or one in named or one not in makers:
            continue
        seen.add(one)
        maker = makers[one]
        inner = core.jaxprs_in_params(maker.eqn.params)
        if maker.primitive in _PRODUCTS or any(works(jaxpr) for jaxpr in inner):
            return True
        left += maker.eqn.invars
    return False


def _shortened(names: list[str]) -> list[str]:
    """Return the names without the folders that all share; one that stands twice is numbered."""
    folders = [os.path.dirname(name) for name in names if "/" in name]
    shared = os.path.commonpath(folders) if len(folders) > 1 else ""
    prefix = f"{shared}/" if shared else ""
    found: list[str] = []
    for name in names:
        short = name.removeprefix(prefix)
        count = sum(other.split("#")[0] == short for other in found)
        found.append(f"{short}#{count + 1}" if count else short)
    return found
