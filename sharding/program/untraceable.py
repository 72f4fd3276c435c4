"""What JAX cannot trace of a user's loss, in a sentence with the user's line."""

from __future__ import annotations

import contextlib
import dis
import itertools
import pathlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core

from ..errors import UserError, one_line
from ..hlo.frames import is_library
from ..paths import by_path
from ..words import first_of
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
_NAMES = ("params", "batch", "state")
# How many of a tree's paths a sentence names.
_MOST = 6


@contextlib.contextmanager
def told(name: str, takes: Callable[..., bool], given: Callable[[], Sequence[Any]]) -> Iterator[None]:
    """Within it, the loss `name` is called with what is `given`; `takes` says whether it would take others.

    Raises UserError for a mistake that JAX would speak of in words of its own, for arguments in another order
    than the loss takes them, and for a loss that reads what they have not; what else it raises is the loss's
    own to raise.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        args = given()
        said = (
            _of_order(name, takes, args)
            or _of_jax_s_own(name, error)
            or _of_call(name, len(args), error)
            or _of_jax(name, error)
            or _of_lookup(name, args, error)
        )
        if said is None:
            raise
        raise UserError(said) from error


def _of_order(name: str, takes: Callable[..., bool], args: Sequence[Any]) -> str | None:
    """Say that two arguments were swapped, if the loss fails of them as they are and not the other way."""
    for one, other in itertools.combinations(range(len(args)), 2):
        swapped = [*args]
        swapped[one], swapped[other] = args[other], args[one]
        if takes(*swapped):
            names = _NAMES[one], _NAMES[other]
            return (
                f"the {names[0]} and the {names[1]} look swapped: the loss ({name}) fails on what it got as "
                f"loss({', '.join(_NAMES[: len(args)])}), and not the other way round"
            )
    return None


def _of_jax_s_own(name: str, error: Exception) -> str | None:
    """Say what a loss does that JAX has an error of its own for."""
    known = [kind.__name__ for kind in type(error).__mro__]
    for mistake in _MISTAKES:
        if mistake.type in known and mistake.words in str(error):
            return f"the loss ({name}) cannot be traced: {_where(error)}it {mistake.does}"
    return None


def _of_call(name: str, arguments: int, error: Exception) -> str | None:
    """Say that a loss does not take what it is called with, if that is what it raised.

    The error has then come through this context and the call alone.
    """
    if not isinstance(error, TypeError) or len([*traceback.walk_tb(error.__traceback__)]) > _OF_THE_CALL:
        return None
    asked = ", ".join(_NAMES[:arguments])
    return f"the loss ({name}) is called as loss({asked}), which it does not take: {error}"


def _of_lookup(name: str, args: Sequence[Any], error: Exception) -> str | None:
    """Say what a loss looks up or computes with that it was not given, unless it says so itself."""
    if not isinstance(error, (LookupError, AttributeError, TypeError)) or _is_own(error):
        return None
    given = "; ".join(f"{one}: {_inside(tree)}" for one, tree in zip(_NAMES, args, strict=False))
    hint = ""
    if "'list'" in str(error) or "'tuple'" in str(error):
        hint = "; a list of numbers is a tree of them, no array: give jnp.asarray of it"
    return (
        f"the loss ({name}) cannot be traced: {_where(error)}it fails with {type(error).__name__}: "
        f"{one_line(error)}; it was given {given}{hint}"
    )


def _is_own(error: Exception) -> bool:
    """Whether an error was raised by a statement of the user's, rather than by an expression or a library."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or is_library(last.tb_frame.f_code.co_filename):
        return False
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _inside(tree: Any) -> str:
    """Return the paths of a tree, or what it is where it is no tree."""
    rows = by_path(tree)
    if [*rows] == [""]:
        return f"an array {jnp.shape(rows[''])}"
    return first_of([repr(path) for path in rows], _MOST) if rows else "nothing"


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
