"""What layers may keep for their backward pass, from everything to nothing, as ladders of policies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from ...cost.candidate import Candidate
from ...cost.profile import ProgramTables
from ...errors import UserError, nearest, wrong
from ...plans.vocabulary import NAMES, PLACES, REMATS
from ...program.layers import INPUT

# A policy, or the values that are kept → ``device`` or ``host``.
DeclaredRemat = str | Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """`remat` as in `meshwright.sharding.transform.remat`, and under ``names`` the values that are kept."""

    remat: str
    saved: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def over_ticks(self) -> bool:
        """Whether stages may keep what layers keep: not all that gradients read, and on the device."""
        return self.remat != "none" and "host" not in self.saved.values()

    def on(self, layout: Candidate, microbatches: int) -> Candidate:
        """Return `layout` worked through in so many microbatches under this policy."""
        return dataclasses.replace(layout, remat=self.remat, saved=self.saved, microbatches=microbatches)


# A ladder over more values than that takes several a rung.
_MOST_RUNGS = 7

PLAIN = tuple(Policy(remat=remat) for remat in REMATS)


def read(declared: DeclaredRemat) -> Policy:
    """Return the policy that a user declares. Raises UserError for an unknown word or place."""
    if isinstance(declared, Mapping):
        for name, place in declared.items():
            if place not in PLACES:
                raise UserError(f"remat: {name}: {place!r} is no place; {nearest(str(place), PLACES)}")
        return Policy(remat=NAMES, saved=dict(declared))
    if not isinstance(declared, str) or declared not in REMATS:
        raise wrong("remat", declared, f"is not a policy; {nearest(str(declared), REMATS)}")
    return Policy(remat=declared)


def check_names(policy: Policy, profile: ProgramTables) -> None:
    """Raise UserError if the layers have no value of a name that is to be kept."""
    known = [*profile.saved.named, INPUT]
    for name in policy.saved:
        if name not in known:
            raise UserError(f"remat: no layer has a value named {name!r}; {nearest(name, known)}")


def ladders(profile: ProgramTables, *, host: bool) -> tuple[tuple[Policy, ...], ...]:
    """Return ladders of policies, each rung keeping less than the one before it.

    The first goes from everything over fewer and fewer values to nothing: those that take most work for each
    byte to make again are kept longest. With a `host` to take them, there are ladders of one rung, for values
    that are kept there, and one like the first with the layers' input there.
    """
    names = _worth_keeping(profile)
    steps = min(len(names), _MOST_RUNGS)
    counts = [len(names) * step // steps for step in range(steps, 0, -1)]
    sets = [dict.fromkeys(names[:count], "device") for count in counts]
    kept = [Policy(remat=NAMES, saved=saved) for saved in sets]
    found: list[tuple[Policy, ...]] = [(PLAIN[0], *kept, PLAIN[-1])]
    if host:
        thirds = dict.fromkeys(len(names) * part // 3 for part in (3, 2, 1))
        found += [
            (Policy(remat=NAMES, saved=dict.fromkeys(names[:count], "host")),) for count in thirds if count
        ]
        found.append(tuple(Policy(remat=NAMES, saved={**saved, INPUT: "host"}) for saved in [*sets, {}]))
    return tuple(found)


def _worth_keeping(profile: ProgramTables) -> list[str]:
    """Return the values that save products where they are kept, those that save most for a byte first."""
    saved, values, products = profile.saved, profile.values, profile.products
    flops = products.flops * profile.steps.runs[products.equation]
    nothing = saved.by_policy["full"]
    needed = saved.by_policy["none"] & saved.layers & ~saved.core
    all_again, _ = saved.flow.again(nothing, needed)
    worth = {}
    for name, mask in saved.named.items():
        spared = all_again & ~saved.flow.again(nothing | mask, needed)[0]
        work = float(flops[spared[products.equation]].sum())
        size = float((values.bytes * values.runs)[mask].sum())
        if work > 0:
            worth[name] = work / max(size, 1.0)
    return sorted(worth, key=lambda name: (-worth[name], _size(profile, name)))


def _size(profile: ProgramTables, name: str) -> float:
    return float(np.dot(profile.values.bytes, profile.saved.named[name]))
