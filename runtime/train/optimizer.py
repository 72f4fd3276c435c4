"""Optax optimisers and schedules from settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...sharding.errors import UserError
from ...sharding.paths import map_by_path, names_by_path
from ..config import OptimizerConfig

if TYPE_CHECKING:
    import optax

# Dimensions that stack copies of a parameter or name one of its parts: they do not make a vector a matrix.
_STACKING = ("layers", "experts", "groups")


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step, for a run of `steps` steps.

    Raises UserError if the final fall of `wsd` is longer than what warm-up leaves of the run.
    """
    import optax

    peak, last = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = config.warmup_steps
    rest = max(steps - warmup, 1)
    if (config.decay_steps or 0) > rest:
        raise UserError(
            f"optimizer.decay_steps={config.decay_steps} does not fit in train.steps={steps} after "
            f"warmup_steps={warmup}; nearest: {rest}"
        )
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, last, rest)
    else:
        fall = min(config.decay_steps or max(steps // 5, 1), rest)
        after = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, last, fall)], [rest - fall]
        )
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def build(config: OptimizerConfig, rate: optax.Schedule, names: Any) -> optax.GradientTransformation:
    """Return the optimiser with clipping and decoupled weight decay.

    `names` is the model's tree of dimension-name tuples, one a parameter: it tells matrices, which are
    decayed (and orthogonalised by muon), from vectors, which are not. What has no names goes by its rank.
    """
    import optax

    def decay(params: Any) -> Any:
        return _map_names(is_matrix, names, params)

    if config.name == "adamw":
        update = optax.adamw(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mu_dtype=config.moment_dtype,
            mask=decay,
        )
    elif config.name == "lion":
        update = optax.lion(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mu_dtype=config.moment_dtype,
            mask=decay,
        )
    elif config.name == "adafactor":
        update = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(config.weight_decay, mask=decay),
            optax.scale_by_learning_rate(rate),
        )
    else:
        update = _muon(config, rate, names, decay)
    if config.clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def is_matrix(names: Sequence[str | None]) -> bool:
    """Whether a parameter of these dimensions maps one space to another, stacking aside."""
    return len([name for name in names if name not in _STACKING]) >= 2


def _muon(config: OptimizerConfig, rate: Any, names: Any, decay: Any) -> optax.GradientTransformation:
    """Muon for the matrices inside the layers, AdamW for embeddings, unembeddings and vectors."""
    import optax

    def dimensions(dims: Sequence[str | None]) -> Any:
        if not is_matrix(dims) or "vocab" in dims:
            return None
        inside = [i for i, name in enumerate(dims) if name not in _STACKING]
        embed = next((i for i in inside if dims[i] == "embed"), inside[0])
        others = tuple(i for i in inside if i != embed)
        into, out = ((embed,), others) if embed == inside[0] else (others, (embed,))
        return optax.contrib.MuonDimensionNumbers(reduction_axis=into, output_axis=out)

    # Updates scaled to AdamW's usual root mean square let one learning rate serve both: arXiv 2502.16982.
    update = optax.contrib.muon(
        1.0,
        beta=config.beta1,
        eps=config.epsilon,
        mu_dtype=config.moment_dtype,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: _map_names(dimensions, names, params),
    )
    return optax.chain(
        update,
        optax.scale(-1.0),
        optax.add_decayed_weights(config.weight_decay, mask=decay),
        optax.scale_by_learning_rate(rate),
    )


def _map_names(function: Any, names: Any, params: Any) -> Any:
    known = {} if names is None else names_by_path(names)
    return map_by_path(lambda path, leaf: function(known.get(path, (None,) * leaf.ndim)), params)
