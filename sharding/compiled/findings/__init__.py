"""What a compiler did that nobody planned: one small function each, over the same evidence.

Each returns findings with the line of the user's program, what it costs in a step, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable

from ...plans.proof import Finding
from ..evidence import Evidence
from .communication import (
    gathered_by_reduction,
    overlaps_nothing,
    reduced_whole,
    replicated_to_reshard,
    resharding,
)
from .computing import rematerialised, unknown_loops, unpriced_kernels
from .log import findings_in_log as findings_in_log
from .storage import kept_whole, padding, spilled_to_host

#: Every finding there is; one's own may be appended.
FINDERS: list[Callable[[Evidence], list[Finding]]] = [
    gathered_by_reduction,
    reduced_whole,
    resharding,
    replicated_to_reshard,
    rematerialised,
    kept_whole,
    padding,
    overlaps_nothing,
    spilled_to_host,
    unknown_loops,
    unpriced_kernels,
]


def findings(evidence: Evidence) -> tuple[Finding, ...]:
    """Return everything found, the costliest in seconds first, then in bytes."""
    found = [finding for finder in FINDERS for finding in finder(evidence)]
    return tuple(sorted(found, key=lambda finding: (-finding.seconds, -finding.bytes)))
