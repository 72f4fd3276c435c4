"""From a config to what a training loop needs: model, data, plan and jitted step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ...models import Model
from ...sharding import Plan, Topology, train_step
from ...sharding.errors import UserError
from ...sharding.ops.kernels import kernel_facts
from ...sharding.plans.file import to_dict
from ...sharding.transform.step import Step
from ..config import Config
from ..data import Data, open_corpus, open_data
from ..data.corpus import Report, to_stderr
from ..data.segments import counted, rounded
from . import optimizer
from .model import build_model
from .packing import Packing
from .planning import Shapes, described_topology, plan_of

if TYPE_CHECKING:
    from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A config made real on the devices that are here."""

    model: Model
    data: Data
    held_out: Data | None
    topology: Topology
    plan: Plan
    mesh: Mesh
    loss: Callable[[Any, Any], Any]
    step: Step
    abstract_batch: Any
    tokens_per_step: int
    flops_per_step: float
    peak_flops: float | None


def build_job(config: Config) -> Job:
    """Open the data, build the model, make the plan and the step; nothing runs on the devices yet.

    Raises UserError for whatever cannot work together.
    """
    import jax

    topology = described_topology(config) or Topology.local()
    model = build_model(config.model)
    rows, sequence = config.train.global_batch, config.data.sequence
    shapes = Shapes.of(config, model)
    rate = optimizer.schedule(config.optimizer, config.train.steps)
    transformation = optimizer.build(config.optimizer, rate, model.names)
    # One process says what there is to say of text that all of them read.
    report = to_stderr if jax.process_index() == 0 else lambda _: None
    packing, corpus = _packing(config, report), None
    if packing.wanted(config) and packing.segments is None:
        corpus = open_corpus(config.data, report)
        counted_in = open_data(config.data, config.seed, rows, corpus=corpus)
        packing = dataclasses.replace(packing, segments=rounded(counted(counted_in, config.seed)))
    plan = plan_of(config, shapes, topology, transformation, packing)
    check_same_plan(plan)
    mesh = plan.make_mesh()
    corpus = open_corpus(config.data, report) if corpus is None else corpus
    corpus.check_vocab(_vocab(model, shapes))
    _check_same_text(corpus.fingerprint)
    data = checked_segments(open_data(config.data, config.seed, rows, corpus=corpus), config, plan)
    held_out = None
    if config.train.evaluate_every:
        held_out = open_data(config.data, config.seed, rows, "eval", corpus=corpus)
        held_out = checked_segments(held_out, config, plan)
    step = train_step(
        plan,
        shapes.loss,
        shapes.init,
        shapes.batch,
        transformation,
        mesh=mesh,
        evaluation=None if model.evaluation is None else jax.jit(model.evaluation),
        measure=lambda state: {"learning_rate": rate(state["step"])},
        guard=None if config.train.stop_on_nan else False,
    )
    tokens = rows * sequence
    return Job(
        model=model,
        data=data,
        held_out=held_out,
        topology=topology,
        plan=plan,
        mesh=mesh,
        loss=shapes.loss,
        step=step,
        abstract_batch=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes.batch,
            step.batch,
        ),
        tokens_per_step=tokens,
        flops_per_step=model.flops_per_token(sequence) * tokens,
        peak_flops=_peak_flops(topology),
    )


def _packing(config: Config, report: Report) -> Packing:
    """Return what is known of packed rows, of kernels what every process knows of its device."""
    import jax

    found = Packing.here(config)
    if jax.process_count() == 1 or config.attention != "auto" or not config.data.packing:
        return found
    from jax.experimental import multihost_utils

    names = sorted(kernel_facts())
    mine = np.array([name in found.compared for name in names])
    of_all = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, len(names))
    agreed = tuple(name for n, name in enumerate(names) if of_all[:, n].all())
    if found.compared != agreed and set(found.compared) - set(agreed):
        report("note: not every host has found the same kernels right; meshwright doctor --kernels on each")
    return dataclasses.replace(found, compared=agreed)


def checked_segments(data: Data, config: Config, plan: Plan) -> Data:
    """Return `data` with each batch held to the segments that the plan's attention takes of a row.

    Raises UserError where a row that was counted has more.
    """
    most = plan.kernels.get("attention", {}).get("segments")
    if most is None or not config.data.packing:
        return data
    found = counted(data, config.seed)
    if found > most:
        raise UserError(
            f"a row of data.source={config.data.source!r} has {found} segments and the plan's attention "
            f"takes {most}; plan again with data.segments={found}, or attention=cudnn"
        )
    return dataclasses.replace(data, segments=most)


def _check_same_text(fingerprint: str) -> None:
    """Refuse hosts that read different text, such as the libraries of different Python versions."""
    odd = _differing_process(fingerprint)
    if odd is not None:
        raise UserError(
            f"data.source is not the same text on every host: process {odd} reads other documents "
            "than process 0; give all of them one copy"
        )


def check_same_plan(plan: Plan) -> None:
    """Refuse hosts that would compile different programs, such as those with other files of one name."""
    # Estimates are sums of floats, which may differ in their last digits from one processor to the next.
    odd = _differing_process(json.dumps(to_dict(plan.decision()), sort_keys=True))
    if odd is not None:
        raise UserError(
            f"process {odd} has another plan than process 0; save one with meshwright plan --save FILE and "
            "give every host that file with plan=FILE"
        )


def _differing_process(text: str) -> int | None:
    """Return the first process whose `text` is not that of process 0; None if all have the same."""
    import jax

    if jax.process_count() == 1:
        return None
    from jax.experimental import multihost_utils

    mine = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
    found = multihost_utils.process_allgather(np.uint32(mine))
    return next((index for index, other in enumerate(found) if other != found[0]), None)


def _vocab(model: Model, shapes: Shapes) -> int:
    """Return how many token ids a model knows, by its config or its logits; any number if neither says.

    JAX reads an id beyond a table as not a number, or as the last one: nothing else would say so.
    """
    import jax

    if (known := getattr(model.config, "vocab", None)) is not None:
        return known
    first = (shapes.params, shapes.state) if model.has_state else shapes.params
    found = jax.eval_shape(model.logits, first, shapes.batch["tokens"])
    return found.shape[-1] if len(getattr(found, "shape", ())) == 3 else 2**31


def _peak_flops(topology: Topology) -> float | None:
    """What all devices together can do in bfloat16, where they are of a part with a datasheet."""
    each = topology.chip.peak_bf16_flops
    return None if topology.chip.nominal or each is None else each * topology.num_devices
