"""The training step and the first state of a run, sharded as a Plan says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ..plans import arrays
from ..plans.record import Record
from .compose import apply

if TYPE_CHECKING:
    import optax
    from jax.sharding import AbstractMesh, Mesh


State = dict[str, Any]
Measure = Callable[[State], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What a training loop calls.

    `init(key)` creates the state ``{"step", "params", "optimizer"}``, every array on the devices that
    hold it and never whole on one. `update(state, batch)` gives the next state and the step's metrics
    (`loss`, `grad_norm` and the loss's own aux values, scalars); it donates `state`. `evaluate(params,
    batch)` gives ``(loss, aux)`` of one batch. `abstract_state` holds the state's ShapeDtypeStructs with
    their shardings, `batch` the NamedShardings of a batch.
    """

    init: jax.stages.Wrapped
    update: jax.stages.Wrapped
    evaluate: jax.stages.Wrapped
    abstract_state: State
    batch: Any


def train_step(
    plan: Record,
    loss: Callable[[Any, Any], Any],
    init: Callable[[Any], Any],
    batch: Any,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    measure: Measure | None = None,
) -> Step:
    """Jit the step of `loss(params, batch)` under `plan`.

    `init(key)` gives the parameters, `batch` is a tree of arrays or ShapeDtypeStructs of the global
    batch, and `measure(state)` may add scalars to the metrics (the learning rate, say). Raises UserError
    when the parameters or the batch are not those that the plan was made for.
    """
    plain = with_aux(loss)
    first = _first(init, optimizer)
    shapes = jax.eval_shape(first, jax.random.key(0))
    arrays.check(plan, shapes["params"], batch)
    state_shardings = arrays.shardings(plan, shapes, mesh)
    batch_shardings = arrays.shardings(plan, batch, mesh, "batch")
    return Step(
        init=jax.jit(first, out_shardings=state_shardings),
        update=jax.jit(
            planned_update(plan, loss, optimizer, mesh, measure),
            in_shardings=(state_shardings, batch_shardings),
            out_shardings=(state_shardings, None),
            donate_argnums=0,
            compiler_options=dict(plan.compiler_options) or None,
        ),
        evaluate=jax.jit(plain, in_shardings=(state_shardings["params"], batch_shardings)),
        abstract_state=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            state_shardings,
        ),
        batch=batch_shardings,
    )


def jitted_update(
    plan: Record, loss: Callable[[Any, Any], Any], optimizer: optax.GradientTransformation, *, mesh: Mesh
) -> Callable[[State, Any], tuple[State, dict[str, Any]]]:
    """Return the jitted ``(state, batch) -> (state, metrics)``; it learns the state's structure when called.

    `state` is donated and stays where `plan` puts it; `batch` may lie anywhere, on the host too.
    """
    update = planned_update(plan, loss, optimizer, mesh)

    def constrained(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        arrays.check(plan, state["params"], batch, loss)
        batch = jax.lax.with_sharding_constraint(batch, arrays.shardings(plan, batch, mesh, "batch"))
        state, metrics = update(state, batch)
        return jax.lax.with_sharding_constraint(state, arrays.shardings(plan, state, mesh)), metrics

    return jax.jit(constrained, donate_argnums=0, compiler_options=dict(plan.compiler_options) or None)


def first_state(
    plan: Record,
    init: Callable[[Any], Any],
    key: Any,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
) -> State:
    """Create the state ``{"step", "params", "optimizer"}``, every array on the devices that hold it."""
    first = _first(init, optimizer)
    shapes = jax.eval_shape(first, key)
    arrays.check_arrays(plan, "parameter", shapes["params"])
    return jax.jit(first, out_shardings=arrays.shardings(plan, shapes, mesh))(key)


def _first(init: Callable[[Any], Any], optimizer: optax.GradientTransformation) -> Callable[[Any], State]:
    def first(key: Any) -> State:
        params = init(key)
        return {"step": jnp.int32(0), "params": params, "optimizer": optimizer.init(params)}

    return first


def abstract_state(params: Any, optimizer: optax.GradientTransformation) -> State:
    """Return the shapes of the state that training `params` by `optimizer` has."""
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    return {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "params": params,
        "optimizer": jax.eval_shape(optimizer.init, params),
    }


def planned_update(
    plan: Record,
    loss: Callable[[Any, Any], Any],
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    measure: Measure | None = None,
) -> Callable[[State, Any], tuple[State, dict[str, Any]]]:
    """Return ``(state, batch) -> (state, metrics)`` under `plan`, not jitted."""
    planned = with_aux(apply(plan, loss, mesh))

    def update(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        (value, aux), gradients = jax.value_and_grad(planned, has_aux=True)(state["params"], batch)
        updates, moments = optimizer.update(gradients, state["optimizer"], state["params"])
        params = jax.tree.map(lambda old, change: (old + change).astype(old.dtype), state["params"], updates)
        metrics = {"loss": value, "grad_norm": _norm(gradients), **(aux if isinstance(aux, dict) else {})}
        if measure is not None:
            metrics |= measure(state)
        return {"step": state["step"] + 1, "params": params, "optimizer": moments}, metrics

    return update


def with_aux(loss: Callable[[Any, Any], Any]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return `loss` so that it always gives ``(value, aux)``, aux being empty if it gave none."""

    def wrapped(params: Any, batch: Any) -> tuple[Any, Any]:
        result = loss(params, batch)
        return result if isinstance(result, tuple) else (result, {})

    return wrapped


def _norm(gradients: Any) -> Any:
    """Root of the sum of squares over all gradients, in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(gradients)))
