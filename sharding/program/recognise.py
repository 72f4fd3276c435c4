"""Forms that a traced program is searched for, and rewritten by, before anything else reads it.

People write attention, losses and layers in many ways; each is worked through in one. What is recognised
becomes the form that costs, kernels and transforms know: attention a call of `ops.attention`, a loss over a
whole vocabulary one in chunks, repeated layers a scan. Planner and transforms both read the rewritten
program, and a program without such a form stays the very object that JAX traced.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax

from ..errors import UserError, nearest
from .forms.rewriting import with_attention, with_losses
from .jaxpr import Traced
from .repeats.numbered import walked
from .repeats.roll import rolled

# In the order in which they are looked for: what a layer computes is one thing before layers are compared.
FORMS = ("attention", "losses", "layers")

# Returns the same function traced, rewritten where the form was found, with a note for whatever a plan should
# tell; the argument itself where there is none of it.
Recogniser = Callable[[Traced], Traced]

_RECOGNISERS: Mapping[str, Recogniser] = {
    "attention": with_attention,
    "losses": with_losses,
    "layers": lambda traced: rolled(walked(traced)),
}


def recognised(traced: Traced, which: Iterable[str] = FORMS) -> Traced:
    """Return `traced` with the forms `which` rewritten: the same arguments, results and values.

    Its `notes` say where something was recognised, and where something is nearly a form and why it is left
    as it is written; its `written` is the jaxpr of `traced`.
    """
    found = traced
    with usual_promotion():
        for form in checked_forms(which):
            if form in _RECOGNISERS:
                found = _RECOGNISERS[form](found)
    return found if found is traced else dataclasses.replace(found, written=traced.jaxpr)


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
    """Within it arrays of several ranks and types meet as they do by default, whatever the user has set.

    A user's setting is about what the user writes, and that is traced before it is rewritten.
    """
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def checked_forms(which: Iterable[str]) -> tuple[str, ...]:
    """Return forms in the order of `FORMS`. Raises UserError for a word that is none.

    >>> checked_forms(["layers", "attention"])
    ('attention', 'layers')
    """
    if not isinstance(which, Iterable):
        raise UserError(f"recognise={which!r} must be some of {', '.join(FORMS)}")
    words = (which,) if isinstance(which, str) else tuple(which)
    for word in words:
        if word not in FORMS:
            raise UserError(f"recognise={word!r} is not known; {nearest(word, FORMS)}")
    return tuple(form for form in FORMS if form in words)
