"""The training step and the first state of a run, sharded as a Plan says."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..errors import UserError, wrong
from ..paths import map_by_path
from ..plans import arrays
from ..plans.record import Decision, Record, check_record
from ..plans.trainable import split
from ..program.jaxpr import shapes_of
from ..program.loss import insisting
from ..xla.options import check_options
from .compose import PlannedLoss
from .meshes import automatic, of_plan
from .metrics import named, norm, whole
from .optimizer import FORWARD, change, check_state, extra_of, handles_nonfinite, own_state, wanted
from .said import (
    OF_LOSS,
    check_given,
    donated,
    is_key,
    lying_elsewhere,
    not_arrays,
    not_there,
    other_count,
    other_devices,
    positional,
    takes,
)

if TYPE_CHECKING:
    import optax
    from jax.sharding import Mesh


State = dict[str, Any]
"""``{"step", "params", "optimizer", "stopped"}``: the updates that were made, what they were made to, and
whether a loss or gradient was not finite, from where on nothing changes; and ``state``, that of the loss,
where it has one."""
_PARTS = ("step", "params", "optimizer", "stopped", "state")
Measure = Callable[[State], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What a training loop calls.

    `init(key)` creates the state ``{"step", "params", "optimizer", "stopped"}``, every array on the devices
    that hold it and never whole on one; the optimizer's arrays are of the parameters that are trained.
    `update(state, batch)` gives the next state and the step's metrics:
    `loss`, `grad_norm` and the loss's own aux values by their paths (``aux/loss`` where a name is taken,
    ``aux/0`` of a tuple); it donates `state`. `evaluate(params, batch)` gives ``(loss, aux)`` of one batch,
    aux as the loss gives it. `abstract_state` holds the state's ShapeDtypeStructs with their shardings,
    `batch` the NamedShardings of a batch. `guarded` says whether a loss or a gradient that is not finite
    leaves the state as it was and sets ``state["stopped"]``, after which nothing changes.

    Of a loss with a state `init(key)` creates that too, below ``state``; `update` replaces it by what the
    loss returns, and `evaluate(params, batch, state)` reads it and leaves it as it is.
    """

    init: jax.stages.Wrapped
    update: jax.stages.Wrapped
    evaluate: jax.stages.Wrapped
    abstract_state: State
    batch: Any
    guarded: bool


def train_step(
    plan: Record,
    loss: Callable[[Any, Any], Any],
    init: Callable[[Any], Any],
    batch: Any,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    evaluation: Callable[..., Any] | None = None,
    measure: Measure | None = None,
    guard: bool | None = None,
) -> Step:
    """Return the step of `loss(params, batch)` under `plan`, with what goes before and after it.

    Args:
        plan: how the step is worked through.
        loss: the unsharded function, to a scalar or ``(scalar, aux)``; where the plan has a state,
            ``loss(params, batch, state)`` to ``(scalar, (aux, state))``.
        init: gives the parameters, from a random key; where the plan has a state, ``(params, state)``.
        batch: a tree of arrays or ShapeDtypeStructs, the global batch.
        optimizer: its state is part of the step's.
        mesh: the plan's axes over devices, as `plan.make_mesh()` gives it.
        evaluation: the loss that `evaluate` takes in place of `loss`, of the same arguments, to a scalar or
            ``(scalar, aux)``: one that drops nothing out, say, and reads the statistics that are kept.
        measure: gives scalars, of a state, that are added to the metrics (the learning rate, say).
        guard: whether a step whose loss or gradients are not finite is left out, and all after it. None is
            yes, unless the optimizer's state shows that it deals with such gradients itself, see
            `transform.optimizer.handles_nonfinite`.

    Raises:
        UserError: the parameters or the batch are not those that the plan was made for, or the optimizer
            needs what a step cannot give it.
    """
    check_record("plan", plan)
    for name, function in (("evaluation", evaluation), ("measure", measure)):
        if function is not None and not callable(function):
            raise wrong(name, function, "is no function")
    mesh = of_plan(plan, mesh)
    first = _first(plan, init, optimizer)
    shapes = jax.eval_shape(first, jax.random.key(0))
    arrays.check(plan, shapes["params"], batch, state=shapes.get("state"))
    planned = PlannedLoss(plan, loss, mesh)
    of_state = arrays.shardings(plan, shapes, mesh)
    of_batch = arrays.shardings(plan, batch, mesh, "batch")
    return Step(
        init=cast("jax.stages.Wrapped", _Said(jax.jit(first, out_shardings=of_state), ("key",), mesh)),
        update=jitted_update(plan, planned, optimizer, mesh=mesh, measure=measure, guard=guard),
        evaluate=jitted_evaluate(
            plan,
            _evaluated(planned) if evaluation is None else _judged(PlannedLoss(plan, evaluation, mesh)),
            mesh=mesh,
        ),
        abstract_state=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            of_state,
        ),
        batch=of_batch,
        guarded=_guarded(guard, shapes["optimizer"]),
    )


def _evaluated(planned: PlannedLoss) -> Callable[..., Any]:
    return lambda params, batch, *state: parts_of(planned.value(params, batch, *state), *state)[:2]


def _judged(planned: PlannedLoss) -> Callable[..., Any]:
    return lambda *args: with_aux(planned.value(*args))


def jitted_update(
    plan: Record,
    planned: PlannedLoss,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    measure: Measure | None = None,
    guard: bool | None = None,
) -> jax.stages.Wrapped:
    """Return the jitted ``(state, batch) -> (state, metrics)``; it learns the state's structure when called.

    `state` is donated and stays where `plan` puts it; `batch` may lie anywhere, on the host too. Raises
    UserError, when called, if the state, the batch or the loss are not those that the plan was made for.
    """
    wanted(optimizer)
    mesh = of_plan(plan, mesh)

    def update(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        with automatic(mesh):
            return within(state, batch)

    def within(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        lacks = {"step", "params", "optimizer"} - set(state if isinstance(state, dict) else ())
        if lacks:
            swapped = "; the second is one: they look swapped, the step takes (state, batch)"
            raise UserError(
                f"the first argument is no training state: it lacks {', '.join(sorted(lacks))}"
                f"{swapped if _is_training(batch) else ''}"
            )
        if others := [key for key in state if key not in _PARTS]:
            raise UserError(
                f"the training state has {others[0]!r}; a state has {', '.join(_PARTS)} and no more"
            )
        # One of other making may lack the flag.
        state = {"stopped": jnp.bool_(False), **state}
        state["params"] = insisting(state["params"], "parameter")
        if "state" in state:
            state["state"] = insisting(state["state"], "state array")
        # Inside of a jitted function all of a batch are arrays already.
        of_batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
        shapes = shapes_of(state), of_batch
        arrays.check(plan, shapes[0]["params"], shapes[1], state=shapes[0].get("state"))
        if plan.origin is not None:
            plan.origin.check(planned.traces.on(shapes[0]["params"], shapes[1], *of_loss(shapes[0])))
        check_state(optimizer, shapes[0]["optimizer"], split(shapes[0]["params"], plan.trainable).trained)
        of_state = arrays.shardings(plan, shapes[0], mesh)
        batch = jax.lax.with_sharding_constraint(batch, arrays.shardings(plan, shapes[1], mesh, "batch"))
        state, metrics = updated(planned, optimizer, state, batch, measure, guard=guard)
        return jax.lax.with_sharding_constraint(state, of_state), whole(metrics, mesh)

    check_options(plan.compiler_options)
    jitted = jax.jit(update, donate_argnums=0, compiler_options=dict(plan.compiler_options) or None)
    return cast("jax.stages.Wrapped", _Said(jitted, ("state", "batch"), mesh))


def jitted_evaluate(plan: Decision, function: Callable[..., Any], *, mesh: Mesh) -> jax.stages.Wrapped:
    """Return `function` of ``(params, batch)``, or ``(params, batch, state)``, jitted; rows may be fewer.

    Raises UserError, when called, if the arrays are otherwise not those that the plan was made for.
    """
    mesh = of_plan(plan, mesh)

    def evaluate(params: Any, batch: Any, *state: Any) -> tuple[Any, Any]:
        with automatic(mesh):
            return within(params, batch, *state)

    def within(params: Any, batch: Any, *state: Any) -> tuple[Any, Any]:
        arrays.check_arrays(plan, "parameter", params)
        arrays.check_rows(plan, batch)
        arrays.check_has_state(plan, state[0] if state else None)
        for one in state:
            arrays.check_arrays(plan, "state array", one)
        rows = {path: NamedSharding(mesh, PartitionSpec(*row.spec)) for path, row in plan.batch.items()}
        of_batch = map_by_path(lambda path, _: rows[path], batch)
        of_params = arrays.shardings(plan, params, mesh)
        return function(
            jax.lax.with_sharding_constraint(params, of_params),
            jax.lax.with_sharding_constraint(batch, of_batch),
            *(
                jax.lax.with_sharding_constraint(one, arrays.shardings(plan, one, mesh, "state"))
                for one in state
            ),
        )

    said = _Said(jax.jit(evaluate), OF_LOSS, mesh)
    return cast("jax.stages.Wrapped", said)


def first_state(
    plan: Record,
    init: Callable[[Any], Any],
    key: Any,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
) -> State:
    """Create the first state, every array on the devices that hold it."""
    mesh = of_plan(plan, mesh)
    first = _first(plan, init, optimizer)
    try:
        shapes = jax.eval_shape(first, key)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError) or is_key(key):
            raise
        raise _wrong_key(key) from error
    arrays.check_arrays(plan, "parameter", shapes["params"])
    if "state" in shapes:
        arrays.check_arrays(plan, "state array", shapes["state"])
    return _Said(jax.jit(first, out_shardings=arrays.shardings(plan, shapes, mesh)), ("key",), mesh)(key)


def _first(
    plan: Decision, init: Callable[[Any], Any], optimizer: optax.GradientTransformation
) -> Callable[[Any], State]:
    wanted(optimizer)
    if not callable(init) or not takes(init, 1):
        raise wrong("init", init, "is no function of a key, which is all that it is called with")

    def first(key: Any) -> State:
        params, beside = init(key), {}
        if plan.state is not None:
            if not isinstance(params, tuple) or len(params) != 2:
                raise UserError("the plan has a state: init(key) has to return (params, state)")
            params, beside["state"] = params[0], insisting(params[1], "state array")
        check_given((params,), ("parameters that init gives",))
        params = insisting(params, "parameter")
        kept = own_state(optimizer, split(params, plan.trainable).trained)
        return {
            "step": jnp.int32(0),
            "params": params,
            "optimizer": insisting(kept, "optimizer array"),
            **beside,
            "stopped": jnp.bool_(False),
        }

    return first


def of_loss(state: State) -> tuple[Any, ...]:
    """Return what a loss takes of a training state beside the parameters."""
    return (state["state"],) if "state" in state else ()


def lasting(state: Any) -> Any:
    """Return what of a state outlasts a run: all but ``stopped``, which no state that is kept has set.

    Any other tree is returned as it is.
    """
    if not _is_training(state):
        return state
    return {key: part for key, part in state.items() if key != "stopped"}


def resumed(kept: Any, like: Any) -> Any:
    """Return the state that goes on from what `lasting` gave of one `like` this, a state or its shapes."""
    if not _is_training(like):
        return kept
    stopped = jax.jit(lambda: jnp.bool_(False), out_shardings=like["stopped"].sharding)()
    return {**kept, "stopped": stopped}


def has_stopped(state: Any) -> bool:
    """Whether a tree is a training state, a loss or gradient of whose steps was not finite."""
    return _is_training(state) and bool(state["stopped"])


def _is_training(state: Any) -> bool:
    return isinstance(state, dict) and {"step", "params", "optimizer", "stopped"} <= state.keys()


def abstract_state(
    plan: Decision, params: Any, optimizer: optax.GradientTransformation, loss_state: Any = None
) -> State:
    """Return the shapes of the state that training `params` by `optimizer` has under `plan`.

    `loss_state` is that of the loss, None where it has none.
    """

    def shapes(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)

    params = shapes(params)
    return {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "params": params,
        "optimizer": jax.eval_shape(
            functools.partial(own_state, optimizer), split(params, plan.trainable).trained
        ),
        **({} if plan.state is None else {"state": shapes(loss_state)}),
        "stopped": jax.ShapeDtypeStruct((), jnp.bool_),
    }


def updated(
    planned: PlannedLoss,
    optimizer: optax.GradientTransformation,
    state: State,
    batch: Any,
    measure: Measure | None = None,
    *,
    guard: bool | None = None,
) -> tuple[State, dict[str, Any]]:
    """Return the state after one step on `batch`, and the step's metrics; `guard` is as of `train_step`."""
    beside = of_loss(state)
    found, gradients = planned.value_and_grad(state["params"], batch, *beside)
    value, aux, changed = parts_of(found, *beside)
    length = norm(gradients)
    parts = planned.split(state["params"])

    def scalar(trained: Any) -> Any:
        return with_aux(planned.value(parts.joined(trained), batch, *beside))[0]

    extra = extra_of(optimizer, scalar, value, gradients)
    changes, moments = change(optimizer, gradients, state["optimizer"], parts.trained, extra)
    changes = planned.as_stored(changes)
    trained = jax.tree.map(lambda old, change: (old + change).astype(old.dtype), parts.trained, changes)
    after = {"step": state["step"] + 1, "params": parts.joined(trained), "optimizer": moments, **changed}
    after["optimizer"] = insisting(after["optimizer"], "optimizer array")
    stopped = state["stopped"]
    if _guarded(guard, state["optimizer"]):
        stopped |= ~(jnp.all(jnp.isfinite(value)) & jnp.isfinite(length))
        after = jax.tree.map(functools.partial(_unless, stopped), {key: state[key] for key in after}, after)
    metrics = {"loss": value, "grad_norm": length, **({} if measure is None else measure(state))}
    return {**after, "stopped": stopped}, {**metrics, **named(aux, metrics)}


def _unless(stopped: Any, old: Any, new: Any) -> Any:
    """Return `new`, or what it was if the state has stopped.

    A select fuses with what made `new`, and the donated buffer of `old` is written over in place.
    """
    if new is old:
        return new
    new = jnp.asarray(new)
    if old.shape != new.shape:
        return new
    return jnp.where(stopped, old if old.dtype == new.dtype else old.astype(new.dtype), new)


def _guarded(guard: bool | None, moments: Any) -> bool:
    if guard is not None and not isinstance(guard, bool):
        raise wrong("guard", guard, "must be True, False or None")
    return not handles_nonfinite(moments) if guard is None else guard


def parts_of(result: Any, *state: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return what a loss gave as (value, aux, what changes of a training state by it).

    Raises UserError if a loss that took a `state` gave none, or one of another structure.
    """
    value, aux = with_aux(result)
    if not state:
        return value, aux, {}
    if not isinstance(aux, tuple) or len(aux) != 2:
        raise UserError("a loss with a state returns (loss, (aux, state)), with {} for no aux")
    old, new = map(jax.tree.structure, (state[0], aux[1]))
    if old != new:
        raise UserError(f"the new state has another structure than the state: {new} instead of {old}")
    return value, aux[0], {"state": insisting(aux[1], "state array")}


def with_aux(result: Any) -> tuple[Any, Any]:
    """Return what a loss gave as ``(value, aux)``, aux being empty if it gave none."""
    return result if isinstance(result, tuple) else (result, {})


def _wrong_key(key: Any) -> UserError:
    return wrong("key", key, "is no key of JAX's, such as jax.random.key(0)")


def _no_key(args: Sequence[Any], names: Sequence[str]) -> str | None:
    """Say that what takes a key got something else, or None."""
    if names != ("key",) or is_key(args[0]):
        return None
    return str(_wrong_key(args[0]))


class _Said:
    """A jitted function, as JAX gives it, of arguments called `names`, on `mesh`."""

    def __init__(self, jitted: jax.stages.Wrapped, names: Sequence[str], mesh: Any) -> None:
        functools.update_wrapper(self, jitted, updated=())
        self._jitted, self._names, self._mesh = jitted, tuple(names), mesh

    def __call__(self, *args: Any, **named: Any) -> Any:
        given = self._placed(args, named)
        if said := donated(given) or not_there(given[1:], self._names[1:]):
            raise UserError(said)
        return self._told(self._jitted, given)

    def trace(self, *args: Any, **named: Any) -> jax.stages.Traced:
        """As of `jax.stages.Wrapped`."""
        return self._told(self._jitted.trace, self._placed(args, named))

    def lower(self, *args: Any, **named: Any) -> jax.stages.Lowered:
        """As of `jax.stages.Wrapped`."""
        return self._told(self._jitted.lower, self._placed(args, named))

    def _placed(self, args: tuple[Any, ...], named: dict[str, Any]) -> Sequence[Any]:
        return positional(self._jitted, args, named, "it") if named else args

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)

    def _told(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        try:
            return function(*args)
        except (TypeError, ValueError, RuntimeError) as error:
            said = (
                other_count("it", args, self._names, min(len(self._names), 2))
                or _no_key(args, self._names)
                or not_arrays(args, self._names)
                or other_devices(self._mesh)
                or lying_elsewhere(args, self._names, self._mesh)
                or not_there(args, self._names)
            )
            if said is None and "forward-mode" in str(error) and not isinstance(error, UserError):
                said = FORWARD
            if said is None or isinstance(error, UserError):
                raise
        except (AttributeError, LookupError) as error:
            # Of a user's own init, say, which looks for something of a key's.
            if (said := _no_key(args, self._names)) is None:
                raise
            raise UserError(said) from error
        raise UserError(said)
