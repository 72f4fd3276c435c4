"""Process that tries a plan in small: ``python -m meshwright.runtime.train.check_worker FOLDER``.

FOLDER has ``request.json``, with a config and how many devices to simulate, and ``plan.json``; the process
writes ``answer.json`` to it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ...models import Model, decoder, preset
from ...models.transformer.config import check_fields
from ...models.transformer.reduced import reduced as reduced_decoder
from ...sharding.errors import UserError
from ...sharding.plans import arrays, file
from ...sharding.plans.record import Decision, Record
from ...sharding.plans.reduced import Reduction, reduced, reduction_of
from ...sharding.transform.choices import chosen_experts, other_choices
from ...sharding.transform.deviation import Deviation, deviation
from ..config import Config, parse
from ..hosts.simulated import simulate
from .check import PlanCheck
from .model import build_model
from .planning import Shapes
from .small import drawn, small

# Tokens of a row.
_SEQUENCE = 32
# Scalars of parameters up to which a model is tried as it is.
_SMALL = 10_000_000
# The type in which small differences are seen, and by which narrower ones are judged.
_WIDE = "float32"
# A model of the user's own has its products in whatever types it has.
_OWN = "its own types"


def main(folder: pathlib.Path) -> None:
    """Try what `folder` asks for and write the answer there."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    simulate(request["devices"])
    plan = file.read(folder / "plan.json", Record)
    try:
        answer = checked(parse(request["config"]), plan).to_dict()
    except UserError as error:
        answer = {"refused": str(error)}
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def checked(config: Config, plan: Record) -> PlanCheck:
    """Try `plan`, which is that of `config`, on this process's devices; see `check.check_plan`."""
    how = reduction_of(plan, _layers_in_stages(plan))
    sequence = how.size(config.data.sequence, _SEQUENCE)
    found: dict[str, Deviation] = {}
    measure, sizes, wide = None, {}, None
    for kind, one in _subjects(config, plan, how, sequence).items():
        decision = _decision(plan, how, one.arguments)
        mesh = arrays.mesh_of(decision)
        found[kind] = deviation(decision, one.loss, *one.arguments, mesh=mesh, measure=measure)
        if measure is not None and wide:
            turned = other_choices(wide, chosen_experts(one.loss, *one.arguments))
            found[kind] = dataclasses.replace(found[kind], routed=turned)
        measure, sizes = found[kind].plain if kind == _WIDE else None, one.sizes
        wide = chosen_experts(one.loss, *one.arguments) if kind == _WIDE else None
    return PlanCheck(reduction=how, model=sizes, types=found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is tried: a loss, its arguments (parameters, batch, and the state where there is one), sizes."""

    loss: Callable[..., Any]
    arguments: tuple[Any, ...]
    sizes: Mapping[str, int]


def _layers_in_stages(plan: Decision) -> int | None:
    return next((dim.size for dim in plan.dims.values() if "stage" in dim.axes), None)


def _subjects(config: Config, plan: Decision, how: Reduction, sequence: int) -> dict[str, _Subject]:
    """Return what is tried by the type of its products: in a wide one first, then in its own."""
    settings = config.model
    if settings.build is not None:
        settings = settings.model_copy(update={"arguments": settings.arguments | settings.reduced})
        model = build_model(settings)
        if model.num_parameters <= _SMALL or settings.reduced:
            return {_OWN: _as_built(model, config, how, sequence)}
        return {_OWN: _as_traced(model, config, plan, how, sequence)}
    whole = preset(settings.preset or "", **settings.overrides)
    shape = reduced_decoder(whole, how.size, layers=how.layers, sequence=sequence, whole=config.data.sequence)
    check_fields(settings.reduced)
    shape = dataclasses.replace(shape, **settings.reduced)
    models = {
        kind: decoder(dataclasses.replace(shape, compute_dtype=kind))
        for kind in dict.fromkeys((_WIDE, shape.compute_dtype))
    }
    return {kind: _as_built(model, config, how, sequence) for kind, model in models.items()}


def _as_built(model: Model, config: Config, how: Reduction, sequence: int) -> _Subject:
    """Return a small model with what it begins with, and rows as short as it takes."""
    shapes = Shapes.of(_with_rows(config, how.rows, sequence), model)
    first = shapes.init(jax.random.key(config.seed))
    params, *state = first if model.has_state else (first,)
    try:
        jax.eval_shape(shapes.loss, params, shapes.batch, *state)
    except Exception:  # A user's own function may raise anything where its rows are of one length.
        sequence = config.data.sequence
    batch = example_batch(how.rows, sequence, int(getattr(model.config, "vocab", 2)), config.seed)
    batch = {key: batch[key] for key in shapes.batch}
    names = ("layers", "embed", "heads", "mlp", "vocab", "experts")
    sizes = {name: size for name in names if isinstance(size := getattr(model.config, name, None), int)}
    return _Subject(
        loss=shapes.loss, arguments=(params, batch, *state), sizes={**sizes, "sequence": sequence}
    )


def _as_traced(model: Model, config: Config, plan: Decision, how: Reduction, sequence: int) -> _Subject:
    """Return a large model of the user's with small dims and drawn parameters.

    Raises UserError, saying what to set, where it stays too large.
    """
    shapes = Shapes.of(config, model)
    found = small(plan, how, shapes, sequence)
    scalars = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(found.params))
    if scalars > _SMALL:
        given = ", ".join(config.model.arguments) or "none"
        could = ", ".join(f"{name}={size}" for name, size in found.sizes.items()) or "nothing"
        raise UserError(
            f"model.build={config.model.build!r} gives a model of {model.num_parameters:,} parameters, of "
            f"which {scalars:,} stay where what can be is made small ({could}): too many to try in seconds; "
            f"set model.reduced to arguments of a small one (its arguments: {given})"
        )
    rows, length = next(iter(found.batch.values())).shape
    batch = example_batch(rows, length, found.ids, config.seed)
    state = tuple(drawn(one, config.seed + 1) for one in found.state)
    arguments = (drawn(found.params, config.seed), {key: batch[key] for key in found.batch}, *state)
    return _Subject(loss=shapes.loss, arguments=arguments, sizes={**found.sizes, "sequence": length})


def _with_rows(config: Config, rows: int, sequence: int) -> Config:
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"sequence": sequence}),
            "train": config.train.model_copy(update={"global_batch": rows}),
        }
    )


def _decision(plan: Record, how: Reduction, arguments: tuple[Any, ...]) -> Decision:
    try:
        return reduced(plan, how, *arguments)
    except UserError as error:
        raise UserError(
            f"the plan does not go over the small model: {error}; set model.reduced to sizes that it divides"
        ) from None


def example_batch(rows: int, sequence: int, vocab: int, seed: int) -> dict[str, np.ndarray]:
    """Return rows of two documents of drawn tokens each, with padding behind; int32 ``[rows, sequence]``."""
    drawn = np.random.default_rng(seed)
    tokens = drawn.integers(0, vocab, (rows, sequence + 1))
    ends = drawn.integers(1, sequence, (rows, 2))
    ends.sort(axis=1)
    index = np.arange(sequence)
    second, padding = index >= ends[:, :1], index >= np.maximum(ends[:, 1:], ends[:, :1] + 1)
    positions = np.where(second, index - ends[:, :1], index)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": np.where(padding, -1, tokens[:, 1:]),
        "positions": positions,
        "segment_ids": np.where(padding, 0, 1 + second),
    }
    return {key: value.astype(np.int32) for key, value in batch.items()}


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
