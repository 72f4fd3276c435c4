"""One planned step through the real compiler: does it fit, what does it consist of, how long does it take."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..cost.calibration import calibration_for, compiled_part
from ..errors import UserError
from ..hardware.topology import Topology
from ..plans import arrays, file
from ..plans.proof import Proof
from ..plans.record import Record
from ..plans.specs import axes_in, cut_into
from ..xla.versions import versions
from . import cache
from .process import Limits, run_worker

if TYPE_CHECKING:
    import optax


# Outcomes that the same compiler gives again, so that they are kept on disk.
_LASTING = ("compiled", "out_of_memory", "failed")
# Estimated so many times what a device holds, a step is not compiled: estimates were never that far off.
_HOPELESS = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of compiling a plan.

    Attributes:
      outcome: ``fits``, ``out_of_memory``, ``vmem_overflow``, ``failed`` (the compiler refused the program),
        ``timed_out``, ``too_large`` (the compiler for this machine), ``died``.
      message: one sentence for a user.
      proof: what came out, where it compiled, even if it is too large.
      peak_bytes: what a device would hold; 0 where nobody said.
      capacity_bytes: what a device offers.
      cached: whether it was known from before.
    """

    outcome: str
    message: str
    proof: Proof | None = None
    peak_bytes: float = 0.0
    capacity_bytes: float = math.inf
    cached: bool = False

    @property
    def fits(self) -> bool:
        """Whether the step compiled and a device holds it."""
        return self.outcome == "fits"


def verify(
    plan: Record,
    loss: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    optimizer: optax.GradientTransformation,
    *,
    fingerprint: str | None = None,
    limits: Limits | None = None,
    use_cache: bool = True,
    schedules: bool = False,
) -> Verdict:
    """Compile the training step of `plan` for its topology, in a process of its own, and read the result.

    Nothing runs; devices need not be here. With `schedules` a TPU's products are timed by the compiler's own
    schedule rather than by what it estimated before (see `schedule.py`): nearer to measured steps by a tenth
    or two, for about twice the compiler's work. `fingerprint` is that of the traced loss, where it is known.
    Raises UserError if the topology's compiler is not installed or the plan is for another program.
    """
    topology = plan.topology
    refuse_missing(topology)
    early = _too_large_already(plan, params, batch, optimizer, topology)
    if early is not None:
        return early
    here = versions(topology)
    key = cache.key_of(
        {
            "plan": file.to_dict(plan.decision()),
            "program": fingerprint or _fingerprint_of(loss, params, batch),
            "written": _where(loss),
            "optimizer": _optimizer_of(optimizer, params),
            "versions": here,
            "schedules": schedules,
            "efficiencies": compiled_part(calibration_for(topology.chip.name)),
        }
    )
    known = cache.load(key, lambda kept: _judge(kept, topology, cached=True)) if use_cache else None
    if known is not None:
        return known
    from .export import export_step

    arrays.check(plan, params, batch, loss)
    exported = export_step(plan, loss, params, batch, optimizer, topology)
    request = {
        "plan": file.to_dict(plan),
        "donated": exported.donated,
        "arguments": exported.arguments,
        "options": dict(plan.compiler_options),
        "versions": here,
        "schedules": schedules,
    }
    ran = run_worker(request, exported.program, environment(topology), limits or Limits())
    if ran.answer["outcome"] in _LASTING:
        cache.keep(key, ran.answer, ran.hlo)
    return _judge(ran.answer, topology, cached=False)


def refuse_missing(topology: Topology) -> None:
    """Raise UserError, saying what to install, if no compiler for `topology` is here."""
    if topology.chip.platform == "cpu":
        return
    from ..xla.targets import missing

    sentence = missing(topology)
    if sentence is not None:
        raise UserError(sentence)


def environment(topology: Topology) -> dict[str, str]:
    """Return what a child's environment must say: no accelerator is looked for, one compiler is loaded."""
    words = {"JAX_PLATFORMS": "cpu"}
    if topology.chip.platform == "cpu":
        return {**words, "JAX_NUM_CPU_DEVICES": str(topology.num_devices)}
    if topology.is_torus:
        return {
            **words,
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            # No device is opened, so that several compilers may work side by side.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    return {**words, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}


def capacity_of(topology: Topology) -> float:
    """Return the bytes of a device that a step may take."""
    chip = topology.chip
    return math.inf if chip.nominal else chip.usable_bytes


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
    from ..words import gib

    return f"compiled, it needs {gib(peak)} of a device's {gib(capacity)}, {gib(peak - capacity)} too much"


def _too_large_already(
    plan: Record, params: Any, batch: Any, optimizer: optax.GradientTransformation, topology: Topology
) -> Verdict | None:
    """Return the verdict on a plan that need not be compiled to know that it does not fit."""
    from ..words import gib

    capacity = capacity_of(topology)
    stored = stored_bytes(plan, params, batch, optimizer)
    if stored > capacity:
        message = f"parameters, moments and batch alone take {gib(stored)} of a device's {gib(capacity)}"
        return Verdict(outcome="out_of_memory", message=message, peak_bytes=stored, capacity_bytes=capacity)
    if plan.estimate is not None and plan.estimate.peak_bytes > _HOPELESS * capacity:
        peak = plan.estimate.peak_bytes
        message = f"it is estimated at {gib(peak)} of a device's {gib(capacity)}, too far off to compile it"
        return Verdict(outcome="out_of_memory", message=message, peak_bytes=peak, capacity_bytes=capacity)
    return None


def stored_bytes(plan: Record, params: Any, batch: Any, optimizer: optax.GradientTransformation) -> float:
    """Return the bytes of a device that the state and the batch take, exactly, apart from padding."""
    import jax

    from ..transform.step import abstract_state

    total = 0.0
    for kind, tree in (("params", abstract_state(params, optimizer)), ("batch", batch)):
        specs = jax.tree.leaves(
            arrays.specs(plan, tree, kind), is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec)
        )
        for leaf, spec in zip(jax.tree.leaves(tree), specs, strict=True):
            total += math.prod(leaf.shape) * leaf.dtype.itemsize / cut_into(axes_in(spec), plan.mesh)
    return total


def _fingerprint_of(loss: Callable[[Any, Any], Any], params: Any, batch: Any) -> str:
    """Return the fingerprint of the traced loss."""
    import jax

    from ..program.tracing import trace

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, batch))
    return trace(loss, *shapes).fingerprint


def _where(loss: Callable[[Any, Any], Any]) -> str:
    """Return the file and line of a function, for whose lines an answer is given; empty if it has none."""
    code = getattr(inspect.unwrap(loss), "__code__", None)
    return "" if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def _optimizer_of(optimizer: optax.GradientTransformation, params: Any) -> str:
    """Return the fingerprint of an optimizer's update on `params`."""
    import jax

    from ..program.identity import fingerprint
    from ..transform.step import abstract_state

    state = abstract_state(params, optimizer)
    return fingerprint(jax.make_jaxpr(optimizer.update)(state["params"], state["optimizer"], state["params"]))
