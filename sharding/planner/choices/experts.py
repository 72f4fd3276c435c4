"""Which kernel multiplies rows by their experts: what the chip has, where it takes their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...hardware.chip import Chip
from ...hardware.topology import Topology
from ...ops.experts import experts_call
from ...ops.grouped import TILES
from ...ops.products import product_facts, products_refusal
from ...program.program import Program
from ...xla.gpu_targets import compute_capability


def kernel_of(chip: Chip) -> str:
    """Return the kernel of products of grouped rows that a chip has, plain XLA's loop if it has none."""
    for name, facts in product_facts().items():
        needed = facts.get("capability")
        if chip.platform == facts["platform"] and needed in (None, compute_capability(chip)):
            return name
    return TILES


def choose(program: Program, topology: Topology) -> tuple[Mapping[str, Mapping[str, Any]], tuple[str, ...]]:
    """Return a Plan's ``kernels`` for the calls of `ops.experts` in `program`, and notes.

    A call that the kernel does not take is left to XLA's loop, and a note says why.
    """
    kernel = kernel_of(topology.chip)
    calls = [one.eqn for one in program.equations() if experts_call(one.eqn) is not None]
    if kernel == TILES or not calls:
        return {}, ()
    refused = []
    for eqn in calls:
        x, _, _, *matrices = (atom.aval for atom in eqn.invars)
        refused.append(products_refusal(kernel, x, *matrices))
    reasons = dict.fromkeys(why for why in refused if why is not None)
    notes = tuple(f"products of experts by {kernel} cannot be had: {why}; XLA multiplies" for why in reasons)
    taken = None in refused
    return ({"experts": {"implementation": kernel}} if taken else {}), notes
