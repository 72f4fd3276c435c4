"""Findings of a compiled step, one function for each kind, all from the same evidence.

Each returns what the compiler did that the plan does not have: the line of the user's code, the cost in a
step and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable

from ...plans.proof import Finding
from ..evidence import Evidence
from .communication import (
    gathered_by_reduction,
    overlaps_nothing,
    reduced_each_time,
    reduced_whole,
    replicated_to_reshard,
    resharding,
)
from .computing import rematerialised, unknown_loops, unpriced_kernels
from .spread import (
    dense_experts,
    exchange_larger,
    foreign_in_ring,
    grows_with_microbatches,
    keys_gathered,
    send_not_overlapped,
)
from .storage import kept_whole, padding, sequence_squared, spilled_to_host

#: All functions that find something; others may be appended.
FINDERS: list[Callable[[Evidence], list[Finding]]] = [
    gathered_by_reduction,
    reduced_whole,
    reduced_each_time,
    resharding,
    replicated_to_reshard,
    rematerialised,
    kept_whole,
    sequence_squared,
    padding,
    overlaps_nothing,
    send_not_overlapped,
    grows_with_microbatches,
    keys_gathered,
    foreign_in_ring,
    exchange_larger,
    dense_experts,
    spilled_to_host,
    unknown_loops,
    unpriced_kernels,
]


def findings(evidence: Evidence) -> tuple[Finding, ...]:
    """Return all findings, those with most seconds first, then those with most bytes."""
    found = [finding for finder in FINDERS for finding in finder(evidence)]
    return tuple(sorted(found, key=lambda finding: (-finding.seconds, -finding.bytes)))
