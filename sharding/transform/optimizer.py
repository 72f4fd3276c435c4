"""An optimizer's update as a step calls it: what it wants besides gradients, and what it does with NaN."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from ..errors import UserError, nearest, wrong
from ..paths import by_path

if TYPE_CHECKING:
    import optax

# What a step can give an optimizer beyond gradients, state and parameters, by the names that Optax's own
# optimizers know them by: `obj_fn` is Sophia's name of `value_fn`, `grad_fn` is that of SAM.
EXTRA = ("value", "grad", "value_fn", "obj_fn", "grad_fn")

# What is said of an optimizer whose derivatives of the loss JAX refuses, when the step is lowered.
FORWARD = (
    "the optimizer differentiates the loss forward (jax.jvp, as Hutchinson's estimate in Sophia does), and a "
    "planned loss is differentiated by reverse only; take one that wants gradients alone, or call the update "
    "in a loop of your own with the loss itself"
)

# Python's own words for a call with an argument too many, and for one that lacks an argument.
_UNTAKEN = re.compile(r"got an unexpected keyword argument '(\w+)'")
_MISSING = re.compile(r"missing \d+ required (?:keyword-only |positional )?arguments?: (.*)")

# Words in the names of records and fields by which an optimizer's state shows what it does with NaN:
# ApplyIfFiniteState, ZeroNansState, `should_skip` of MultiSteps, DynamicLossScale, DynamicScale.
_HANDLES = re.compile(
    r"(?:not|if|is|last|non)_?finite|(?:^|_)nans?(?:_|$)|(?:loss|dynamic)_scal(?:e|ing)|should_skip"
)


def wanted(optimizer: optax.GradientTransformation) -> frozenset[str]:
    """Return which of `EXTRA` the optimizer's update takes.

    Raises UserError if it needs, by its own signature, what a step has not.
    """
    if not all(hasattr(optimizer, one) for one in ("init", "update")):
        raise wrong("optimizer", optimizer, "is none of optax's, such as optax.adamw(1e-3)")
    parameters = inspect.signature(optimizer.update).parameters.values()
    needed = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.default is one.empty]
    for name in needed:
        if name not in EXTRA:
            raise _unknown(name)
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return frozenset(EXTRA)
    return frozenset(one.name for one in parameters if one.name in EXTRA)


def change(
    optimizer: optax.GradientTransformation, gradients: Any, state: Any, params: Any, extra: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Return what `optimizer` adds to `params`, and its next state.

    `extra` is what `extra_of` gives. A chain says that it takes all of it and hands all on: what one within
    it, such as `optax.contrib.sam`, does not take is left out. Raises UserError if an optimizer within it
    needs another.
    """
    try:
        return optimizer.update(gradients, state, params, **extra)
    except TypeError as error:
        untaken = _UNTAKEN.search(str(error))
        if untaken and untaken[1] in extra:
            fewer = {name: one for name, one in extra.items() if name != untaken[1]}
            return change(optimizer, gradients, state, params, fewer)
        found = _MISSING.search(str(error))
        names = re.findall(r"'(\w+)'", found[1]) if found else []
        unknown = next((name for name in names if name not in EXTRA), None)
        if unknown is None:
            raise _fails("update", error) from error
        raise _unknown(unknown) from None
    except UserError:
        raise
    except Exception as error:
        raise _fails("update", error) from error


def own_state(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """Return the optimizer's first state. Raises UserError, one sentence, if it fails on `params`."""
    try:
        return optimizer.init(params)
    except Exception as error:
        raise _fails("init", error) from error


def _fails(what: str, error: Exception) -> UserError:
    told = str(error).partition("\n")[0]
    return UserError(
        f"the optimizer's own {what} fails on the parameters of this loss: {type(error).__name__}: {told}"
    )


def check_state(optimizer: optax.GradientTransformation, state: Any, params: Any) -> None:
    """Raise UserError if `state` is that of another optimizer, by what it keeps; `params` are those trained.

    An optimizer may take what it does not know for its own and carry it along, as plain SGD takes Adam's.
    """
    own = jax.eval_shape(functools.partial(own_state, optimizer), params)
    if by_path(own).keys() != by_path(state).keys():
        raise UserError(
            f"the state's optimizer part is that of another optimizer: it keeps {_kept(state)}, where this "
            f"one keeps {_kept(own)}; make the state by plan.init(init, key, optimizer) of this one"
        )


def _kept(state: Any) -> str:
    """Return the records of an optimizer's state that hold arrays, with their fields, or its first arrays."""
    rows = by_path(state)
    if not rows:
        return "nothing"
    records: list[str] = []

    def look(node: Any) -> bool:
        if isinstance(node, tuple):
            names: tuple[str, ...] = getattr(node, "_fields", ())
            fields = (name for name in names if jax.tree.leaves(getattr(node, name)))
            if told := ", ".join(fields):
                records.append(f"{type(node).__name__} ({told})")
        return False

    jax.tree.leaves(state, is_leaf=look)
    said = list(dict.fromkeys(records)) or [repr(path) for path in rows]
    return ", ".join(said[:3]) + (f" and {len(said) - 3} more" if len(said) > 3 else "")


def extra_of(
    optimizer: optax.GradientTransformation, scalar: Callable[[Any], Any], value: Any, gradients: Any
) -> dict[str, Any]:
    """Return the values of `EXTRA` that `optimizer` takes; `scalar` is the loss's, of the parameters."""

    def value_fn(params: Any, obj_fn: Any = None, grad_fn: Any = None) -> Any:
        # Line searches hand on to it what they do not know, and refuse what it has no name for.
        del obj_fn, grad_fn
        return scalar(params)

    def grad_fn(params: Any, inner_step: Any = None) -> Any:
        del inner_step
        return jax.grad(scalar)(params)

    every = dict(zip(EXTRA, (value, gradients, value_fn, scalar, grad_fn), strict=True))
    return {name: every[name] for name in EXTRA if name in wanted(optimizer)}


def handles_nonfinite(state: Any) -> bool:
    """Whether an optimizer's state shows that it deals with gradients that are not finite itself.

    It shows by the names of its records and fields, as in ``ApplyIfFiniteState`` and ``loss_scale``.

    >>> import jax.numpy as jnp, optax
    >>> params = {"w": jnp.ones(2)}
    >>> plain, guarded = optax.adam(1), optax.apply_if_finite(optax.adam(1), 5)
    >>> handles_nonfinite(plain.init(params)), handles_nonfinite(guarded.init(params))
    (False, True)
    """
    records: list[str] = []

    def look(node: Any) -> bool:
        records.append(type(node).__name__)
        return False

    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=look)
    # Keys of dictionaries are among them: some keep their counts there.
    fields = {str(getattr(key, "name", getattr(key, "key", ""))) for keys, _ in leaves for key in keys}
    return any(_HANDLES.search(_snake(name)) for name in {*records, *fields})


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _unknown(name: str) -> UserError:
    return UserError(
        f"the optimizer's update needs {name!r}, which a step has not; {nearest(name, EXTRA)}; bind it "
        "(functools.partial), or call the update in a loop of your own around plan.apply(loss)"
    )
