"""Which kernel multiplies rows by their experts: what the chip has, where it takes their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from ...hardware.chip import Chip
from ...hardware.topology import Topology
from ...ops.experts import experts_call
from ...ops.grouped import TILES
from ...ops.products import product_facts, products_refusal
from ...program.program import Program
from ...xla.gpu_targets import compute_capability

# What may be declared: what the chip wants, plain XLA, or one of the kernels.
AUTO, PLAIN = "auto", "xla"
WORDS = (AUTO, PLAIN, *product_facts())

# Compiled forward and backward for CPUs, v5e and H100: dense but for TPUs' forward pass and rows' gradient.
_RAGGED = "ragged_dot_general"


def kernel_of(chip: Chip) -> str:
    """Return the kernel of products of grouped rows that a chip has, plain XLA's loop if it has none."""
    for name, facts in product_facts().items():
        needed = facts.get("capability")
        if chip.platform == facts["platform"] and needed in (None, compute_capability(chip)):
            return name
    return TILES


def choose(
    program: Program, topology: Topology, declared: str = AUTO
) -> tuple[Mapping[str, Mapping[str, Any]], tuple[str, ...]]:
    """Return a Plan's ``kernels`` for the calls of `ops.experts` in `program`, and notes.

    `declared` is ``auto`` (the chip's own, once it was compared), ``xla`` or a kernel. A call that the kernel
    does not take is left to XLA's loop, and a note says why. So does one of products over groups that
    compilers work out densely.

    Raises UserError for a declared kernel that the chip does not have, or that takes none of the calls.
    """
    dense = _dense(program, topology.chip)
    kernel = kernel_of(topology.chip)
    calls = [one.eqn for one in program.equations() if experts_call(one.eqn) is not None]
    if declared not in (AUTO, PLAIN):
        _check_kernel(declared, kernel, topology.chip, bool(calls))
    if kernel == TILES or declared == PLAIN or not calls:
        return {}, dense
    if declared == AUTO and not product_facts()[kernel]["compared"]:
        offered = {"implementation": kernel}
        why = (
            f"products of experts are XLA's loop over tiles: no {topology.chip.name} has compared {kernel} "
            f"with plain products yet; experts={kernel!r}, or a plan with kernels={{'experts': {offered}}}, "
            "takes it"
        )
        return {}, (why, *dense)
    refused = []
    for eqn in calls:
        x, _, _, *matrices = (atom.aval for atom in eqn.invars)
        refused.append(products_refusal(kernel, x, *matrices))
    reasons = dict.fromkeys(why for why in refused if why is not None)
    if declared != AUTO and None not in refused:
        raise UserError(f"experts={declared!r} cannot multiply by experts: {refused[0]}; experts='xla' can")
    notes = tuple(f"products of experts by {kernel} cannot be had: {why}; XLA multiplies" for why in reasons)
    taken = None in refused
    return ({"experts": {"implementation": kernel}} if taken else {}), notes + dense


def _check_kernel(declared: str, own: str, chip: Chip, called: bool) -> None:
    """Raise UserError for a declared kernel that `chip` lacks, which has its `own`, or that nothing calls."""
    if declared != own:
        near = PLAIN if own == TILES else own
        raise UserError(f"experts={declared!r} is not there on {chip.name}; nearest: experts={near!r}")
    if not called:
        raise UserError(
            f"experts={declared!r}, but the loss has no call of meshwright.sharding.ops.experts; leave it out"
        )


def _dense(program: Program, chip: Chip) -> tuple[str, ...]:
    """Say which `lax.ragged_dot` multiplies every row by every group's matrix, and what does not."""
    found: dict[str, int] = {}
    # Saying where every equation stands takes longer than looking whether it is asked of any.
    if chip.nominal or all(one.primitive != _RAGGED for one in program.equations()):
        return ()
    for one, where in program.located():
        shape = getattr(one.eqn.invars[1].aval, "shape", ()) if one.primitive == _RAGGED else ()
        if len(shape) == 3 and shape[0] > 1:
            found.setdefault(where, shape[0])
    what = "for the gradient of its matrices " if chip.platform == "tpu" else ""
    return tuple(
        f"lax.ragged_dot at {where} multiplies {what}every row by the matrices of all {groups} groups, "
        f"{groups} times the work, when it is compiled for {chip.name}; sharding.ops.experts multiplies each "
        "row by its own"
        for where, groups in found.items()
    )
