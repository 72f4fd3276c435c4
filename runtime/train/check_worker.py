"""Process that tries a plan in small: ``python -m meshwright.runtime.train.check_worker FOLDER``.

FOLDER has ``request.json``, with a config and how many devices to simulate, and ``plan.json``; the process
writes ``answer.json`` to it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np

from ...models import Model, decoder, preset
from ...models.transformer.config import check_fields
from ...models.transformer.reduced import reduced as reduced_decoder
from ...sharding.errors import UserError
from ...sharding.plans import arrays, file
from ...sharding.plans.record import Decision, Record
from ...sharding.plans.reduced import Reduction, reduced, reduction_of
from ...sharding.transform.deviation import Deviation, deviation
from ..config import Config, parse
from ..hosts.simulated import simulate
from .check import PlanCheck
from .model import build_model
from .planning import Shapes

# Tokens of a row.
_SEQUENCE = 32
# Scalars of parameters up to which a model is tried as it is.
_SMALL = 10_000_000
# The type in which small differences are seen, and by which narrower ones are judged.
_WIDE = "float32"


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
    small = config.model_copy(
        update={
            "data": config.data.model_copy(update={"sequence": sequence}),
            "train": config.train.model_copy(update={"global_batch": how.rows}),
        }
    )
    found: dict[str, Deviation] = {}
    measure, model = None, None
    for kind, model in _models(config, how, sequence).items():
        shapes = Shapes.of(small, model)
        decision = _decision(plan, how, shapes)
        given = _arguments(shapes, model, config.seed)
        found[kind] = deviation(decision, shapes.loss, *given, mesh=arrays.mesh_of(decision), measure=measure)
        measure = found[kind].plain if kind == _WIDE else None
    return PlanCheck(reduction=how, model=_sizes(model, sequence), types=found)


def _layers_in_stages(plan: Decision) -> int | None:
    return next((dim.size for dim in plan.dims.values() if "stage" in dim.axes), None)


def _models(config: Config, how: Reduction, sequence: int) -> dict[str, Model]:
    """Return the small model by the type of its products: in a wide one first, then in its own."""
    settings = config.model
    if settings.build is not None:
        settings = settings.model_copy(update={"arguments": settings.arguments | settings.reduced})
        return {"its own types": _as_it_is(build_model(settings), config)}
    whole = preset(settings.preset or "", **settings.overrides)
    layers = how.layers
    shape = reduced_decoder(whole, how.size, layers=layers, sequence=sequence, whole=config.data.sequence)
    check_fields(settings.reduced)
    shape = dataclasses.replace(shape, **settings.reduced)
    types = dict.fromkeys((_WIDE, shape.compute_dtype))
    return {kind: decoder(dataclasses.replace(shape, compute_dtype=kind)) for kind in types}


def _as_it_is(model: Model, config: Config) -> Model:
    """Return a model that is small. Raises UserError, saying what to set, for one that is not."""
    if model.num_parameters <= _SMALL:
        return model
    given = ", ".join(config.model.arguments) or "none"
    raise UserError(
        f"model.build={config.model.build!r} gives a model of {model.num_parameters:,} parameters, too large "
        f"to try in seconds; set model.reduced to arguments of a small one (its arguments: {given})"
    )


def _decision(plan: Record, how: Reduction, shapes: Shapes) -> Decision:
    try:
        return reduced(plan, how, shapes.params, shapes.batch, shapes.state)
    except UserError as error:
        raise UserError(
            f"the plan does not go over the small model: {error}; set model.reduced to sizes that it divides"
        ) from None


def _arguments(shapes: Shapes, model: Model, seed: int) -> tuple[Any, ...]:
    """Return parameters, a batch and, where there is one, the state, as a run begins with them."""
    import jax

    first = shapes.init(jax.random.key(seed))
    params, *state = first if model.has_state else (first,)
    rows, sequence = next(iter(shapes.batch.values())).shape
    batch = example_batch(rows, sequence, _vocabulary(model), seed)
    return params, {key: batch[key] for key in shapes.batch}, *state


def _vocabulary(model: Model) -> int:
    return int(getattr(model.config, "vocab", 2))


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


def _sizes(model: Model | None, sequence: int) -> dict[str, int]:
    """Return the sizes of a small model that are told."""
    config = getattr(model, "config", None)
    names = ("layers", "embed", "heads", "mlp", "vocab", "experts")
    found = {name: value for name in names if isinstance(value := getattr(config, name, None), int)}
    return {**found, "sequence": sequence}


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
