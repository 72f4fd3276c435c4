"""Verification of a plan: its step compiled by the real compiler, and the verdict on what came out."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..cost.calibration import calibration_for, compiled_part
from ..errors import UserError
from ..hardware.attached import QUIETING
from ..hardware.memory import usable_bytes
from ..hardware.topology import Topology
from ..plans import arrays, file
from ..plans.proof import Proof
from ..plans.record import Record
from ..plans.specs import axes_in, cut_into
from ..plans.trainable import split
from ..program.identity import fingerprint as fingerprint_of
from ..program.tracing import trace
from ..transform.metrics import norm
from ..transform.optimizer import change, extra_of
from ..transform.step import abstract_state
from ..words import gib
from ..xla.options import check_options
from ..xla.targets import missing
from ..xla.versions import versions
from . import cache
from .export import export_step
from .process import Limits, run_worker
from .scheduled import shows_schedule

if TYPE_CHECKING:
    import optax


# Outcomes that the same compiler gives again; they are kept on disk.
_LASTING = ("compiled", "out_of_memory", "failed")
# A step that is estimated at so many times what a device holds is not compiled: no estimate was that far off.
_HOPELESS = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of compiling a plan.

    Attributes:
      outcome: ``fits``, ``out_of_memory``, ``vmem_overflow``, ``failed`` (the compiler refused the program),
        ``timed_out``, ``too_large`` (compiling takes more memory than this machine may give), ``died``.
      message: one sentence for a user; empty if it fits.
      proof: what was compiled, also if it does not fit; None if it did not compile.
      peak_bytes: of a device's memory; 0 where it is not known.
      capacity_bytes: of a device's memory that a step may have.
      cached: whether the answer was kept from an earlier compile.
    """

    outcome: str
    message: str
    proof: Proof | None = None
    peak_bytes: float = 0.0
    capacity_bytes: float = math.inf
    cached: bool = False

    @property
    def fits(self) -> bool:
        """Whether the step compiled and fits a device's memory."""
        return self.outcome == "fits"


def verify(
    plan: Record,
    loss: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    optimizer: optax.GradientTransformation,
    *,
    state: Any = None,
    fingerprint: str | None = None,
    limits: Limits | None = None,
    use_cache: bool = True,
    schedules: bool = False,
    quick: bool = False,
    scheduled: bool = False,
) -> Verdict:
    """Compile the training step of `plan` for its topology in a process of its own, and return the verdict.

    Nothing runs, and the devices need not be attached.

    Args:
      plan: the decision that the step carries out.
      loss: the unsharded function, as in `plan`.
      params: its parameters: arrays or ShapeDtypeStructs.
      batch: likewise, the global batch.
      optimizer: of the step.
      state: what the loss reads and gives anew beside the parameters, None for a loss without it.
      fingerprint: of the traced loss, if it is known.
      limits: of time and memory, for the compile.
      use_cache: whether a kept answer will do.
      schedules: whether products on TPUs are timed by the compiler's final schedule instead of its estimate
        (`compiled.schedule`). That is nearer to measured steps by 10 to 20 %, for about twice the compile
        time.
      quick: whether the scheduled program will do, where the topology's compiler shows it before it makes
        machine code (`verify.scheduled`). An answer that is known from a whole compile is as good.
      scheduled: with `quick`, whether it is not as good, since it is to be compared with others as scheduled.

    Raises:
      UserError: the topology's compiler is not installed or refuses an option, or the plan is for another
        program.
    """
    topology = plan.topology
    refuse_missing(topology)
    check_options(plan.compiler_options)
    early = _too_large_already(plan, params, batch, optimizer, topology, state)
    if early is not None:
        return early
    here = versions(topology)
    facts = {
        "plan": file.to_dict(plan.decision()),
        "program": fingerprint or _program_of(loss, params, batch, state),
        "written": _where(loss),
        "optimizer": _optimizer_of(plan, optimizer, params),
        "versions": here,
        "schedules": schedules,
        "efficiencies": compiled_part(calibration_for(topology.chip.name)),
    }
    quick = quick and shows_schedule(topology)
    keys = [cache.key_of({**facts, "quick": one}) for one in ((False, True) if quick else (False,))]
    keys = keys[-1:] if scheduled else keys
    for key in keys if use_cache else ():
        known = cache.load(key, lambda kept: _judge(kept, topology, cached=True))
        if known is not None:
            return known
    arrays.check(plan, params, batch, loss, state)
    exported = export_step(plan, loss, params, batch, optimizer, topology, state)
    request = {
        "plan": file.to_dict(plan),
        "donated": exported.donated,
        "arguments": exported.arguments,
        "options": dict(plan.compiler_options),
        "versions": here,
        "schedules": schedules,
        "quick": quick,
    }
    ran = run_worker(request, exported.program, environment(topology), limits or Limits())
    if ran.answer["outcome"] in _LASTING:
        whole = not ran.answer.get("proof", {}).get("quick", False)
        cache.keep(keys[0] if whole else keys[-1], ran.answer, ran.hlo)
    return _judge(ran.answer, topology, cached=False)


def refuse_missing(topology: Topology) -> None:
    """Raise UserError, saying what to install, if there is no compiler for `topology` on this machine."""
    sentence = None if topology.chip.platform == "cpu" else missing(topology)
    if sentence is not None:
        raise UserError(sentence)


def environment(topology: Topology) -> dict[str, str]:
    """Return variables for the process that compiles: JAX looks for no accelerator and loads one compiler."""
    words = {"JAX_PLATFORMS": "cpu"}
    for variables in QUIETING.values():
        words |= variables
    if topology.chip.platform == "cpu":
        words["JAX_NUM_CPU_DEVICES"] = str(topology.num_devices)
    return words


def capacity_of(topology: Topology) -> float:
    """Return the bytes of a device's memory that a step may have."""
    chip = topology.chip
    return math.inf if chip.nominal else usable_bytes(chip)


def _judge(answer: Mapping[str, Any], topology: Topology, cached: bool) -> Verdict:
    capacity = capacity_of(topology)
    outcome, message = answer["outcome"], str(answer.get("message", ""))
    if outcome == "compiled":
        proof = dataclasses.replace(Proof.from_dict(answer["proof"]).portable(), cached=cached)
        fits = proof.peak_bytes <= capacity
        return Verdict(
            outcome="fits" if fits else "out_of_memory",
            message="" if fits else _too_much(proof.peak_bytes, capacity),
            proof=proof,
            peak_bytes=proof.peak_bytes,
            capacity_bytes=capacity,
            cached=cached,
        )
    if outcome == "out_of_memory" and answer.get("space") != "hbm":
        outcome, message = (
            "vmem_overflow",
            f"a kernel needs more of the chip's own memory than it has: {message}",
        )
    elif outcome == "out_of_memory":
        capacity = float(answer.get("limit_bytes", capacity))
        message = _too_much(float(answer.get("used_bytes", 0.0)), capacity)
    return Verdict(
        outcome=outcome,
        message=message,
        peak_bytes=float(answer.get("used_bytes", 0.0)),
        capacity_bytes=capacity,
        cached=cached,
    )


def _too_much(peak: float, capacity: float) -> str:
    return f"compiled, it needs {gib(peak)} of a device's {gib(capacity)}, {gib(peak - capacity)} too much"


def _too_large_already(
    plan: Record,
    params: Any,
    batch: Any,
    optimizer: optax.GradientTransformation,
    topology: Topology,
    state: Any,
) -> Verdict | None:
    """Return the verdict on a plan that is too large to be worth compiling, else None."""
    capacity = capacity_of(topology)
    stored = stored_bytes(plan, params, batch, optimizer, state)
    if stored > capacity:
        message = f"parameters, moments and batch alone take {gib(stored)} of a device's {gib(capacity)}"
        return Verdict(outcome="out_of_memory", message=message, peak_bytes=stored, capacity_bytes=capacity)
    if plan.estimate is not None and plan.estimate.peak_bytes > _HOPELESS * capacity:
        peak = plan.estimate.peak_bytes
        message = f"it is estimated at {gib(peak)} of a device's {gib(capacity)}, too far off to compile it"
        return Verdict(outcome="out_of_memory", message=message, peak_bytes=peak, capacity_bytes=capacity)
    return None


def stored_bytes(
    plan: Record, params: Any, batch: Any, optimizer: optax.GradientTransformation, state: Any = None
) -> float:
    """Return the bytes of a device that the state and the batch take, without padding."""
    import jax

    total = 0.0
    for kind, tree in (("params", abstract_state(plan, params, optimizer, state)), ("batch", batch)):
        specs = jax.tree.leaves(
            arrays.specs(plan, tree, kind), is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec)
        )
        for leaf, spec in zip(jax.tree.leaves(tree), specs, strict=True):
            total += math.prod(leaf.shape) * leaf.dtype.itemsize / cut_into(axes_in(spec), plan.mesh)
    return total


def _program_of(loss: Callable[..., Any], params: Any, batch: Any, state: Any) -> str:
    """Return the fingerprint of the traced loss."""
    import jax

    args = (params, batch) if state is None else (params, batch, state)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)
    return trace(loss, *shapes).fingerprint


def _where(loss: Callable[[Any, Any], Any]) -> str:
    """Return the file and line of a function, on which a proof's source lines depend, or an empty text."""
    code = getattr(inspect.unwrap(loss), "__code__", None)
    return "" if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def _optimizer_of(plan: Record, optimizer: optax.GradientTransformation, params: Any) -> str:
    """Return the fingerprint of an optimizer's update on the trained of `params`."""
    import jax

    state = abstract_state(plan, params, optimizer)
    trained = split(state["params"], plan.trainable).trained

    def update(gradients: Any, moments: Any, params: Any) -> Any:
        # What asks for the loss is given another function: the loss has a fingerprint of its own.
        extra = extra_of(optimizer, lambda params: norm(params), norm(params), gradients)
        return change(optimizer, gradients, moments, params, extra)

    return fingerprint_of(jax.make_jaxpr(update)(trained, state["optimizer"], trained))
