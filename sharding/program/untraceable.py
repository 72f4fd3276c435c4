"""What JAX cannot trace of a user's loss, in a sentence with the user's line."""

from __future__ import annotations

import contextlib
import pathlib
import traceback
from collections.abc import Iterator
from typing import NamedTuple

from jax.core import Tracer
from jax.extend import core

from ..errors import UserError
from ..hlo.frames import is_library
from .lines import line_of


class _Mistake(NamedTuple):
    """An error of JAX or Flax by the name of its type and words of its text, and what the loss does then."""

    type: str
    words: str
    does: str


_READS = (
    "reads what is in an array (by if, while, float(), NumPy), which is not known before it runs; take "
    "jnp.where, jax.lax.cond or jnp in its place"
)

_LEFT = (
    "reads an array that another trace has left outside of the loss, in a global or an attribute; hand it on "
    "as an argument or a result"
)

_MISTAKES = (
    _Mistake(
        "NonConcreteBooleanIndexError",
        "",
        "picks elements by a mask, so that the result's size is not known before it runs; take jnp.where, or "
        "weights of 0 and 1",
    ),
    *(
        _Mistake(name, "", _READS)
        for name in (
            "TracerBoolConversionError",
            "TracerIntegerConversionError",
            "TracerArrayConversionError",
            "ConcretizationTypeError",
        )
    ),
    _Mistake("UnexpectedTracerError", "", _LEFT),
    _Mistake(
        "TraceContextError",
        "",
        "changes a variable of a module that it closes over; split it off and declare it: plan(…, state=…), "
        "the loss then being loss(params, batch, state)",
    ),
    _Mistake(
        "NameError",
        "unbound axis name",
        "names an axis that is not there; the loss sees the whole batch, so leave psum and pmean out",
    ),
    _Mistake(
        "RuntimeError",
        "non-empty mesh",
        "says by a PartitionSpec alone how an array lies, though no mesh is set; leave it to the plan, or "
        "give a NamedSharding",
    ),
)


# Frames of an error that a call raised by itself: this context's, and the one that called.
_OF_THE_CALL = 2


@contextlib.contextmanager
def told(name: str, arguments: int) -> Iterator[None]:
    """Within it, the loss `name` is called with so many arguments.

    Raises UserError for a mistake that JAX would speak of in words of its own; what else it raises is the
    loss's own to raise.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        known = [kind.__name__ for kind in type(error).__mro__]
        for mistake in _MISTAKES:
            if mistake.type in known and mistake.words in str(error):
                said = f"the loss ({name}) cannot be traced: {_where(error)}it {mistake.does}"
                raise UserError(said) from error
        if said := _of_call(name, arguments, error) or _of_jax(name, error):
            raise UserError(said) from error
        raise


def _of_call(name: str, arguments: int, error: Exception) -> str | None:
    """Say that a loss does not take what it is called with, if that is what it raised.

    The error has then come through this context and the call alone.
    """
    if not isinstance(error, TypeError) or len([*traceback.walk_tb(error.__traceback__)]) > _OF_THE_CALL:
        return None
    asked = ", ".join(("params", "batch", "state")[:arguments])
    return f"the loss ({name}) is called as loss({asked}), which it does not take: {error}"


def _of_jax(name: str, error: Exception) -> str | None:
    """Say where a loss asks what cannot be of JAX, such as a product of arrays that do not fit."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    file = frame.f_code.co_filename
    of_jax = is_library(file) and "jax" in pathlib.Path(file).parts
    if not of_jax or not isinstance(error, (TypeError, ValueError)):
        return None
    told = str(error).strip() or type(error).__name__
    return f"the loss ({name}) cannot be traced: {_where(error)}JAX says: {told.splitlines()[0]}"


def check_constants(jaxpr: core.ClosedJaxpr) -> None:
    """Raise UserError if what was traced reads an array of another trace, which JAX tells only later."""
    for var, const in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True):
        if not isinstance(const, Tracer):
            continue
        reads = [eqn for eqn in jaxpr.eqns if any(atom is var for atom in eqn.invars)]
        where = f"at {line_of(reads[0])} " if reads else ""
        raise UserError(f"the loss cannot be traced: {where}it {_LEFT}")


def _where(error: Exception) -> str:
    """Return the innermost of the user's own lines that an error came through."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        code = frame.f_code
        if not is_library(code.co_filename) and not code.co_filename.startswith("<"):
            return f"at {code.co_filename}:{line} ({code.co_name}) "
    return ""
