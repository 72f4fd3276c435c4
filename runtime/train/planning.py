"""From a config to its Plan: searched for, declared, or read from a file; no data is opened."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ...models import Model
from ...sharding import Plan, Topology, declare, plan
from ...sharding.cost.measured import load as load_measurement
from ...sharding.errors import IndivisibleBatch, UserError, nearest
from ...sharding.files import write_asked
from ...sharding.hardware.axes import resolve_axes
from ...sharding.hardware.memory import FRACTIONS, usable_bytes
from ...sharding.planner.outcome import searched_instead
from ...sharding.plans.trainable import trained_paths
from ...sharding.program.recognise import FORMS, checked_forms
from ...sharding.report.compare import compare
from ...sharding.report.html import page as page_of
from ...sharding.report.plan import plan_document
from ...sharding.words import gib
from ..config import Config
from ..data.batches import keys_of
from . import optimizer
from .model import build_model
from .packing import Packing

# What a config without a mesh runs on under `plan: declared`.
DEFAULT_MESH = {"fsdp": -1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a config trains, as abstract arrays: `init` and `loss` are jitted, so that each is traced once."""

    init: Callable[[Any], Any]
    loss: Callable[..., Any]
    params: Any
    batch: Any
    names: Any
    state: Any = None
    trainable: Any = None

    @classmethod
    def of(cls, config: Config, model: Model) -> Shapes:
        """Return the shapes of `model` under `config`."""
        import jax

        shape = jax.ShapeDtypeStruct((config.train.global_batch, config.data.sequence), "int32")
        init = jax.jit(model.init)
        # A key made for real would start the devices, which planning has no need of.
        key = jax.eval_shape(lambda: jax.random.key(0))
        first = jax.eval_shape(init, key)
        if model.has_state and (not isinstance(first, tuple) or len(first) != 2):
            raise UserError("a model with has_state gives (params, state) by its init")
        params, state = first if model.has_state else (first, None)
        return cls(
            init=init,
            loss=jax.jit(model.loss),
            params=params,
            batch=dict.fromkeys(keys_of(config.data), shape),
            names=model.names,
            state=state,
            trainable=model.trainable if config.model.trainable is None else config.model.trainable,
        )


def described_topology(config: Config) -> Topology | None:
    """Return the topology that a config or its plan file names; None where it takes what is attached."""
    if config.topology is not None:
        return Topology.parse(config.topology)
    if config.plan in ("declared", "auto"):
        return None
    return _saved(config.plan).topology


def _saved(file: str) -> Plan:
    """Return the plan of a file. Raises UserError, with what may be meant, where there is none."""
    path = pathlib.Path(file)
    if not path.exists():
        near = sorted(str(found) for found in path.parent.glob("*plan.json"))
        raise UserError(f"no plan file {file}; {nearest(file, ['declared', 'auto', *near])}")
    return Plan.load(path)


def _declared(config: Config, shapes: Shapes, topology: Topology, optimizer: Any, packing: Packing) -> Plan:
    return declare(
        shapes.loss,
        shapes.params,
        shapes.batch,
        topology=topology,
        mesh=DEFAULT_MESH if config.mesh is None else config.mesh,
        rules=config.rules,
        names=shapes.names,
        optimizer=optimizer,
        remat=config.remat or "none",
        microbatches=config.microbatches or 1,
        schedule=config.schedule,
        interleave=config.interleave or 1,
        stage_remat=config.stage_remat is not False,
        accumulation=config.accumulation,
        max_passes=config.max_passes,
        **packing.declared(config),
        context=config.context,
        experts=config.experts,
        arithmetic=config.arithmetic,
        recognise=config.recognise,
        calibration=config.calibration,
        state=shapes.state,
        trainable=shapes.trainable,
    )


def plan_of(
    config: Config, shapes: Shapes, topology: Topology, optimizer: Any, packing: Packing | None = None
) -> Plan:
    """Return the plan that `config` trains by: `plan: declared`, `auto`, or a file.

    `packing` is what is known of packed rows, by this machine where it is not given.

    Raises UserError where the declared parts, the program, the topology and a plan file do not agree.
    """
    packing = Packing.here(config) if packing is None else packing
    if config.plan == "declared":
        try:
            return _declared(config, shapes, topology, optimizer, packing)
        except IndivisibleBatch as error:
            raise UserError(f"train.global_batch: {error}") from None
    if config.plan == "auto":
        return search(config, shapes, topology, optimizer, packing)
    return _from_file(config, shapes, topology)


def search(
    config: Config, shapes: Shapes, topology: Topology, optimizer: Any, packing: Packing | None = None
) -> Plan:
    """Return the best plan on `topology` that keeps whatever `config` declares."""
    packing = Packing.here(config) if packing is None else packing
    return plan(
        shapes.loss,
        shapes.params,
        shapes.batch,
        topology=topology,
        optimizer=optimizer,
        mesh=config.mesh,
        rules=config.rules,
        remat=config.remat,
        microbatches=config.microbatches,
        schedule=config.schedule,
        interleave=config.interleave,
        stage_remat=config.stage_remat,
        accumulation=config.accumulation,
        max_passes=config.max_passes,
        **packing.declared(config),
        context=config.context,
        experts=config.experts,
        arithmetic=config.arithmetic,
        recognise=config.recognise,
        calibration=config.calibration,
        state=shapes.state,
        trainable=shapes.trainable,
        names=shapes.names,
    )


def needs_devices(config: Config, topology: str | None = None) -> bool:
    """Return whether `plan_config` looks at attached devices.

    It does for their topology where none is described, and for what `doctor --kernels` found on them.
    """
    if topology is None and described_topology(config) is None:
        return True
    return bool(Packing.here(config).compared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A config's plan, the seconds that planning took, and what it was planned for."""

    plan: Plan
    seconds: float
    shapes: Shapes
    optimizer: Any

    def verified(self, top: int = 1, *, quick: bool = False) -> Planned:
        """Have the topology's compiler judge the plan, or choose among the `top` best; see `Plan.verify`."""
        shapes = self.shapes
        program = (shapes.loss, shapes.params, shapes.batch, self.optimizer)
        plan = self.plan.verify(*program, state=shapes.state, top=top, quick=quick)
        return dataclasses.replace(self, plan=plan)


def plan_config(config: Config, topology: str | None = None) -> Planned:
    """Return the plan that a config trains by on described or attached devices.

    `topology` takes the place of the config's. A plan that is declared also notes what a search would take
    instead. The seconds are those of tracing and planning, without imports and without that search. Raises
    UserError for whatever cannot work together, and if nothing fits.
    """
    where = Topology.parse(topology) if topology else described_topology(config) or Topology.local()
    if topology and config.mesh:
        _check_mesh(config.mesh, where)
    model = build_model(config.model)
    shapes = Shapes.of(config, model)
    rate = optimizer.schedule(config.optimizer, config.train.steps)
    made = optimizer.build(config.optimizer, rate, model.names)
    start = time.perf_counter()
    found = plan_of(config, shapes, where, made)
    seconds = time.perf_counter() - start
    if config.plan == "declared":
        assert found.problem is not None
        found = dataclasses.replace(found, notes=(*found.notes, searched_instead(found.problem, found)))
    return Planned(plan=found, seconds=seconds, shapes=shapes, optimizer=made)


def _check_mesh(mesh: Mapping[str, int], topology: Topology) -> None:
    """Raise UserError where a config's mesh, made for its own devices, is none of `topology`'s."""
    try:
        resolve_axes(mesh, topology.num_devices)
    except UserError as error:
        raise UserError(f"{error}; or plan=auto mesh=null to search for a mesh of {topology}") from None


def facts(plan: Plan, planning_seconds: float, why: str | None = None) -> dict[str, Any]:
    """Return what `meshwright plan --json` prints; `why` is what was answered, where something was asked."""
    estimate = plan.estimate
    return {
        "topology": str(plan.topology),
        "mesh": dict(plan.mesh),
        "specs": {
            path: [*row.spec, *[None] * (len(row.shape) - len(row.spec))] for path, row in plan.params.items()
        },
        "dims": {name: list(dim.axes) for name, dim in plan.dims.items()},
        "remat": plan.saved or plan.remat,
        "microbatches": plan.microbatches,
        **({} if plan.trainable is None else {"trainable": list(plan.trainable)}),
        "kernels": {operation: dict(kernel) for operation, kernel in plan.kernels.items()},
        "estimate": None if estimate is None else estimate.to_dict(),
        "alternatives": [dataclasses.asdict(row) for row in plan.alternatives],
        "notes": list(plan.notes),
        "planning_seconds": planning_seconds,
        **({} if why is None else {"why": why}),
        **({} if plan.proof is None else {"compiled": plan.proof.to_dict()}),
    }


def compare_plans(a: pathlib.Path, b: pathlib.Path, *, as_json: bool) -> Any:
    """Return two saved plans side by side: a renderable, or JSON's text."""
    found = compare(Plan.load(a), Plan.load(b), (a.name, b.name))
    return json.dumps(found.to_dict()) if as_json else found


def write_files(plan: Plan, *, plan_file: pathlib.Path | None, page: pathlib.Path | None) -> None:
    """Write the plan as JSON and as a page, where asked for. Raises UserError where that cannot be done."""
    if plan_file is not None:
        plan.save(plan_file)
    if page is not None:
        write_asked(page, page_of(plan_document(plan)))


def _from_file(config: Config, shapes: Shapes, topology: Topology) -> Plan:
    found = _saved(config.plan)
    if not found.topology.is_met_by(topology):
        raise UserError(f"{config.plan} is a plan for {found.topology}, not for {topology}; {_again(config)}")
    for axis, size in (config.mesh or {}).items():
        if size not in (-1, found.mesh.get(axis, 1)):
            raise UserError(
                f"the config declares {axis}={size} and {config.plan} has {axis}={found.mesh.get(axis, 1)}; "
                "leave one of them out"
            )
    for key, planned in (
        ("remat", found.saved or found.remat),
        ("microbatches", found.microbatches),
        ("schedule", found.schedule),
        ("interleave", found.interleave),
        ("stage_remat", found.stage_remat),
        ("context", found.context),
    ):
        declared = getattr(config, key)
        if declared not in (None, planned):
            raise UserError(
                f"the config declares {key}={declared} and {config.plan} has {key}={planned}; "
                "leave one of them out"
            )
    if config.accumulation not in ("exact", found.accumulation):
        raise UserError(
            f"the config declares accumulation={config.accumulation} and {config.plan} has "
            f"{found.accumulation}; leave one of them out"
        )
    for operation in ("attention", "experts"):
        planned = found.kernels.get(operation, {}).get("implementation", "xla")
        if (declared := getattr(config, operation)) not in ("auto", planned):
            raise UserError(
                f"the config declares {operation}={declared} and {config.plan} has {planned}; "
                "leave one of them out"
            )
    fast = found.kernels.get("arithmetic", {})
    if config.arithmetic == "jax" and fast:
        raise UserError(
            f"the config declares arithmetic=jax and {config.plan} has {' and '.join(fast)} otherwise; leave "
            "one of them out"
        )
    if config.calibration is not None and load_measurement(config.calibration).digest != found.calibration:
        raise UserError(
            f"{config.plan} was not planned by {config.calibration}; leave one of them out, or plan again"
        )
    forms = checked_forms(config.recognise)
    if forms not in (FORMS, found.recognise):
        raise UserError(
            f"the config declares recognise={_listed(forms)} and {config.plan} has "
            f"{_listed(found.recognise)}; leave one of them out"
        )
    if config.model.trainable is not None:
        wanted = trained_paths(shapes.params, shapes.trainable)
        if wanted != found.trainable:
            raise UserError(
                f"the config trains {_counted(wanted)} and {config.plan} {_counted(found.trainable)}; "
                "leave model.trainable out, or plan again"
            )
    if config.rules:
        rules = ", ".join(config.rules)
        raise UserError(f"the config declares rules ({rules}) beside {config.plan}; leave one of them out")
    try:
        found.check(shapes.params, shapes.batch, shapes.loss, shapes.state)
    except UserError as error:
        raise UserError(f"{config.plan}: {error}; {_again(config)}") from None
    said = list(_too_large(found, topology))
    if found.recognise != forms:
        listed = _listed(found.recognise)
        said.append(f"recognise={listed} is {config.plan}'s; {_again(config)} to recognise all")
    if not said:
        return found
    return dataclasses.replace(found, notes=(*(note for note in found.notes if note not in said), *said))


def _too_large(found: Plan, topology: Topology) -> Iterator[str]:
    """Say of a saved plan that it counts on more memory than a program may have here."""
    chip = topology.chip
    if chip.nominal or found.estimate is None:
        return
    needed = found.estimate.needed_bytes if found.proof is None else found.proof.peak_bytes
    usable = usable_bytes(chip)
    if needed > usable:
        more = f"; a larger {FRACTIONS[0]} gives more of it" if chip.platform == "gpu" else ""
        yield f"this plan needs {gib(needed)} of a device; a program may have {gib(usable)} here{more}"


def _listed(forms: Sequence[str]) -> str:
    return f"[{', '.join(forms)}]"


def _counted(trained: tuple[str, ...] | None) -> str:
    return "all parameters" if trained is None else f"{len(trained)} parameters ({trained[0]}, …)"


def _again(config: Config) -> str:
    return f"plan again: meshwright plan CONFIG plan=auto --save {shlex.quote(config.plan)}"
