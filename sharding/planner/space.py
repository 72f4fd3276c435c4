"""Candidates worth considering: layouts of a program on a mesh, and how a step may be worked through."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..cost.candidate import Candidate
from ..errors import UserError
from ..hardware.topology import Topology
from ..plans.record import check_stages_keep
from ..plans.specs import cut_into
from ..program.layers import is_checkpointed, layer_scans
from ..program.program import Program
from .choices import batch, context, mesh, microbatches, sequence, stages, storage, tensor
from .choices.draft import Choices, Draft, Given, Refused
from .choices.remat import PLAIN, DeclaredRemat, Policy, read
from .declared import Declared

# Says of a layout that is not stored yet, with its numbers of microbatches, whether it is worth considering.
Worth = Callable[[Candidate, Sequence[int]], bool]

# The choices that make a layout, each with what those before it have chosen.
LAYOUT: tuple[Choices, ...] = (
    mesh.choices,
    batch.choices,
    tensor.choices,
    sequence.choices,
    context.choices,
    stages.choices,
    storage.choices,
    stages.ways,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """Candidates as layouts x remat x microbatches.

    `layouts` are Candidates that keep everything and take the batch whole; `remats` are ladders, one after
    another, that go from what keeps most to what keeps least and start at `heads`. `refused` maps what was
    not considered (``tensor=16``) to the reason.
    """

    layouts: tuple[Candidate, ...]
    remats: tuple[Policy, ...]
    heads: tuple[int, ...]
    microbatches: Mapping[int, tuple[int, ...]]
    refused: Mapping[str, str]

    def parts(self, layout: Candidate) -> tuple[int, ...]:
        """Return the numbers of microbatches that `layout` can be worked through in, smallest first."""
        return self.microbatches[_row_parts(layout)]

    def ladders(self, layout: Candidate) -> list[range]:
        """Return the places in `remats` of what `layout` may keep, by ladders."""
        ends = [*self.heads[1:], len(self.remats)]
        found = [range(*both) for both in zip(self.heads, ends, strict=True)]
        if not layout.stage_remat:
            # A ladder begins with all that gradients read, or is of values that go to the host.
            found = [one[not self.remats[one[0]].over_ticks :] for one in found]
            found = [one for one in found if one and self.remats[one[0]].over_ticks]
        return found

    def candidates(self) -> Iterator[Candidate]:
        """Yield every candidate."""
        for layout in self.layouts:
            for place in itertools.chain(*self.ladders(layout)):
                for count in self.parts(layout):
                    yield self.remats[place].on(layout, count)


def space(
    program: Program,
    topology: Topology,
    declared: Declared,
    *,
    params: Any = None,
    names: Any = None,
    proof: microbatches.PartsProof | None = None,
    ladders: Sequence[Sequence[Policy]] = (PLAIN,),
    worth: Worth | None = None,
) -> Space:
    """Return what is worth considering for `program` on `topology`, with the declared parts kept.

    Args:
        program: traced with the parameters first and the data second.
        topology: the devices.
        declared: what is not searched for.
        params: the parameters' tree, needed for rules.
        names: the user's names of their dimensions, as in `trace`.
        proof: in which numbers of parts the batch can be worked through; whole only if not given.
        ladders: what layers may keep, see `remats.ladders`; for programs that have layers.
        worth: says of a layout, before its storage is chosen, whether it is worth considering.

    Raises:
        UserError: the declared parts contradict each other, the program or the topology.
    """
    offered = _offered(program, declared.remat, ladders)
    keeps = any(policy.over_ticks for ladder in offered for policy in ladder)
    if declared.stage_remat is False and not keeps:
        check_stages_keep(False, "none")
    if declared.microbatches is not None:
        microbatches.check_number(declared.microbatches)
        if proof is not None:
            proof.check(declared.microbatches)
    given = Given(
        program=program,
        topology=topology,
        declared=declared,
        params=params,
        names=names,
        proof=proof,
        keeps=keeps,
    )
    layouts, refused = _layouts(given, worth)
    return Space(
        layouts=layouts,
        remats=tuple(policy for ladder in offered for policy in ladder),
        heads=tuple(itertools.accumulate((len(ladder) for ladder in offered[:-1]), initial=0)),
        # Those of most microbatches first: one proof of many parts is one of the fewer that divide them.
        microbatches={parts: _parts(given, parts) for parts in sorted(set(map(_row_parts, layouts)))},
        refused=refused,
    )


def _offered(
    program: Program, declared: DeclaredRemat | None, ladders: Sequence[Sequence[Policy]]
) -> Sequence[Sequence[Policy]]:
    if declared is not None:
        return ((checked_remat(program, declared),),)
    chosen = any(not is_checkpointed(scan) for scan in layer_scans(program.scope))
    return ladders if chosen else ((PLAIN[0],),)


def checked_remat(program: Program, declared: DeclaredRemat) -> Policy:
    """Return the policy that a user declares. Raises UserError if the program has no layers for it."""
    policy = read(declared)
    if policy.remat != "none" and not any(layer_scans(program.scope)):
        raise UserError(
            f"remat={declared!r} works on scanned layers and this program has no scan over layers; "
            "scan them, or leave remat out"
        )
    return policy


def only(candidate: Candidate) -> Space:
    """Return the space of one candidate."""
    return Space(
        layouts=(candidate,),
        remats=(Policy(remat=candidate.remat, saved=candidate.saved),),
        heads=(0,),
        microbatches={_row_parts(candidate): (candidate.microbatches,)},
        refused={},
    )


def _row_parts(layout: Candidate | Draft) -> int:
    """Return in how many parts the rows of a microbatch lie: over the batch's axes, and shared by stages."""
    over = (cut_into(axes, layout.mesh) for axes in layout.dims.values() if "data" in axes or "fsdp" in axes)
    return max(over, default=1) * layout.mesh.get("stage", 1)


def _layouts(given: Given, worth: Worth | None) -> tuple[tuple[Candidate, ...], dict[str, str]]:
    """Return every layout and what was refused; if the batch is too small, ``fsdp`` may only store."""
    refused: dict[str, str] = {}
    for storing in (False, True):
        drafts = [Draft(storing=storing)]
        for choices in LAYOUT:
            if choices is storage.choices and worth is not None and drafts:
                drafts = [
                    one
                    for one in drafts
                    if worth(_candidate(one, given.rows), _parts(given, _row_parts(one)))
                ]
                if not drafts:
                    raise UserError("no layout of this program is worth considering")
            drafts = [way for draft in drafts for way in _taken(choices(given, draft), refused)]
        if drafts:
            return tuple(_candidate(one, given.rows) for one in drafts), refused
    raise UserError(_nothing(refused, given.topology.num_devices))


def _taken(ways: Iterable[Draft | Refused], refused: dict[str, str]) -> Iterator[Draft]:
    for way in ways:
        if isinstance(way, Draft):
            yield way
        else:
            written = " x ".join(f"{axis}={size}" for axis, size in way.sizes.items() if size > 1)
            refused.setdefault(written, way.reason)


def _candidate(draft: Draft, rows: int) -> Candidate:
    stages = draft.mesh.get("stage", 1)
    return Candidate(
        mesh=draft.mesh,
        dims=draft.dims,
        stored=draft.stored,
        optimizer=draft.optimizer,
        gradients=draft.optimizer,
        schedule=draft.schedule,
        interleave=draft.interleave,
        stage_remat=draft.stage_remat,
        rows=rows * stages // _row_parts(draft) if stages > 1 else 0,
        context=draft.context,
    )


def _parts(given: Given, row_parts: int) -> tuple[int, ...]:
    """Return the numbers of microbatches to consider where their rows lie in `row_parts`."""
    if given.declared.microbatches is not None:
        return (given.declared.microbatches,)
    if given.proof is None:
        return (1,)
    # Where stages are more than share the rows out, fewer do.
    return given.proof.among(microbatches.options(given.rows // math.gcd(given.rows, row_parts)))


def _nothing(refused: Mapping[str, str], devices: int) -> str:
    reasons = list(dict.fromkeys(refused.values()))
    if len(reasons) == 1:
        return reasons[0]
    # What is said of what the user wrote comes before what is said of an axis of the search's own.
    telling = [r for words in ("batch of", "shards no parameter") for r in reasons if words in r]
    return f"there is no layout of this program over {devices} devices: {(telling or reasons)[0]}"
