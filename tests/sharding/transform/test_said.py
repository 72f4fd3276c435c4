"""Mistakes at the doors of jitted functions, and derivatives of every kind of a plan's loss."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from meshwright.sharding import Plan, Rules, Topology, UserError, declare, make_mesh, train_step

pytestmark = pytest.mark.devices(8)

SGD = optax.sgd(1e-1)


def init(key: Any) -> Any:
    return {"w": draws.normal(key, (8, 8))}


def batch() -> Any:
    return {"x": np.linspace(-1, 1, 128, dtype=np.float32).reshape(16, 8)}


def loss(params: Any, batch: Any) -> Any:
    return jnp.square(jnp.tanh(batch["x"] @ params["w"])).mean()


def planned(**how: Any) -> Any:
    given = {"params": jax.eval_shape(init, jax.random.key(0)), "batch": batch(), "mesh": {"data": 8}}
    return declare(loss, topology="cpu:8", **{**given, **how})


def test_what_is_no_array_is_named_at_every_door() -> None:
    plan = planned()
    step = train_step(plan, loss, init, batch(), SGD, mesh=plan.make_mesh())
    state = step.init(jax.random.key(0))
    with pytest.raises(UserError, match=r"'f' of the batch is a function .*, which is neither an array"):
        step.update(state, {**batch(), "f": jnp.tanh})
    with pytest.raises(UserError, match="'x' of the batch is the text 'text', which is neither an array"):
        step.update.lower(state, {"x": "text"})
    with pytest.raises(UserError, match="'x' of the batch is an object of type ndarray of <U1"):
        step.evaluate(state["params"], {"x": np.array(["a", "b"])})
    with pytest.raises(UserError, match="'w' of the parameters is a function"):
        plan.apply(loss)({"w": jnp.tanh}, batch())


def test_arguments_in_another_order_are_one_sentence() -> None:
    plan, params, key = planned(microbatches=2), init(jax.random.key(0)), jax.random.key(0)
    step = train_step(plan, loss, init, batch(), SGD, mesh=plan.make_mesh())
    state = step.init(key)
    swapped, of_state = "look swapped", "is a training state"
    doors: list[tuple[str, Any]] = [
        (swapped, lambda: step.update(batch(), state)),
        (swapped, lambda: step.evaluate(batch(), params)),
        (of_state, lambda: step.evaluate(state, batch())),
        (of_state, lambda: plan.apply(loss)(state, batch())),
        (swapped, lambda: plan.apply(loss)(batch(), params)),
        (swapped, lambda: plan.check(batch(), params)),
        (swapped, lambda: plan.check_accumulation(loss, batch(), params)),
        (swapped, lambda: plan.specs(params, "batch")),
        ("these are the arrays of the batch", lambda: plan.specs(batch())),
        ("the plan has no 'y'", lambda: plan.specs({**batch(), "y": 0}, "batch")),
        ("is no key of JAX's", lambda: step.init(batch())),
        ("is no key of JAX's", lambda: step.init(1.5)),
    ]
    for says, door in doors:
        with pytest.raises(UserError, match=says):
            door()


def test_arrays_that_were_deleted_are_named_at_every_door() -> None:
    plan, params = planned(microbatches=2), init(jax.random.key(0))
    step = train_step(plan, loss, init, batch(), SGD, mesh=plan.make_mesh())
    gone = jax.device_put(batch(), step.batch)
    gone["x"].delete()
    doors: list[Any] = [
        lambda: step.update(step.init(jax.random.key(0)), gone),
        lambda: step.evaluate(params, gone),
        lambda: plan.apply(loss)(params, gone),
        lambda: plan.check_accumulation(loss, params, gone),
        lambda: plan.deviation(loss, params, gone),
    ]
    for door in doors:
        with pytest.raises(UserError, match="'x' of the batch was deleted"):
            door()
    with pytest.raises(UserError, match="'w' of the parameters that init gives was deleted"):
        plan.init(lambda _: {"w": gone["x"]}, jax.random.key(0), SGD)


def test_a_batch_on_a_mesh_of_another_order_is_one_sentence() -> None:
    plan, params = planned(microbatches=2), init(jax.random.key(0))
    step = train_step(plan, loss, init, batch(), SGD, mesh=plan.make_mesh())
    other = jax.sharding.Mesh(np.array(jax.devices()[::-1]), ("x",))
    there = jax.device_put(batch(), NamedSharding(other, PartitionSpec("x")))
    for door in (step.evaluate, plan.apply(loss)):
        with pytest.raises(
            UserError, match="'x' of the batch was put on the plan's devices in another order"
        ):
            door(params, there)
    one = jax.device_put(batch(), jax.devices()[3])
    assert plan.check_accumulation(loss, params, one).rows == 16


@pytest.mark.parametrize(
    ("how", "devices"),
    [
        ("shard_map", slice(1)),
        ("constraint", slice(None, None, -1)),
        ("jit", slice(4)),
        ("shard_map", slice(None)),
    ],
)
def test_a_loss_that_lays_arrays_out_by_itself(how: str, devices: slice) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices())[devices], ("x",))
    rows, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())

    def product(x: Any, w: Any) -> Any:
        if how == "shard_map":
            return jax.shard_map(jnp.dot, mesh=mesh, in_specs=(rows.spec, whole.spec), out_specs=rows.spec)(
                x, w
            )
        if how == "constraint":
            return jax.lax.with_sharding_constraint(x @ w, rows)
        return jax.jit(jnp.dot, in_shardings=(rows, whole), out_shardings=rows)(x, w)

    def own(params: Any, batch: Any) -> Any:
        return jnp.tanh(product(batch["x"], params["w"])).mean()

    params = init(jax.random.key(0))
    plan = declare(own, params, batch(), topology="cpu:8", mesh={"data": 8})
    step = plan.train_step(own, SGD)
    if devices == slice(None):
        assert plan.apply(own)(params, batch()) == pytest.approx(float(loss_of(params)), rel=1e-6)
        return
    for door in (
        lambda: plan.apply(own)(params, batch()),
        lambda: step(plan.init(init, jax.random.key(0), SGD), batch()),
    ):
        with pytest.raises(UserError, match=r"the loss itself lays arrays over .* at .*test_said\.py"):
            door()


def loss_of(params: Any) -> Any:
    return jnp.tanh(batch()["x"] @ params["w"]).mean()


def test_a_mesh_of_another_order_is_one_sentence() -> None:
    plan = planned()
    step = train_step(plan, loss, init, batch(), SGD, mesh=plan.make_mesh())
    state = step.init(jax.random.key(0))
    other = jax.sharding.Mesh(np.array(jax.devices()[::-1]), ("data",))
    with (
        pytest.raises(UserError, match=r"the same devices in another order than the plan's \(\[7, 6"),
        jax.set_mesh(other),
    ):
        step.update(state, batch())
    with jax.set_mesh(plan.make_mesh()):
        step.update(state, batch())


@pytest.mark.numerics
def test_plain_data_parallelism_is_differentiated_forward_and_back_any_number_of_times() -> None:
    params = init(jax.random.key(0))

    def all_of(function: Any) -> Any:
        def of(w: Any) -> Any:
            return function({"w": w}, batch())

        w = params["w"]
        pushed = jax.jvp(of, (w,), (w * w,))
        return pushed, jax.jvp(jax.grad(of), (w,), (w,)), jax.grad(lambda w: jax.jvp(of, (w,), (w,))[1])(w)

    want, got = jax.jit(lambda: all_of(loss))(), jax.jit(lambda: all_of(planned().apply(loss)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want)


def test_where_parts_are_gathered_or_added_up_forward_is_one_sentence() -> None:
    params = init(jax.random.key(0))
    for how in ({"mesh": {"fsdp": 8}, "names": {"w": ("embed", "mlp")}}, {"microbatches": 2}):
        made = planned(**how).apply(loss)
        with pytest.raises(UserError, match="differentiated by reverse only"):
            jax.jvp(lambda p, made=made: made(p, batch()), (params,), (params,))


def test_parts_are_worked_through_under_a_mesh_of_other_axes_and_in_batches_of_parameters() -> None:
    plan, params = planned(microbatches=2), init(jax.random.key(0))
    other = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    wanted = jax.jit(jax.value_and_grad(loss))(params, batch())
    with jax.set_mesh(other):
        found = jax.jit(jax.value_and_grad(plan.apply(loss)))(params, batch())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, wanted)
    several = jax.vmap(lambda by: plan.apply(loss)({"w": by * params["w"]}, batch()))(jnp.arange(1.0, 3.0))
    np.testing.assert_allclose(several[0], wanted[0], rtol=1e-6)


def test_other_devices_and_other_arrays_are_one_sentence() -> None:
    plan, params = planned(microbatches=2), init(jax.random.key(0))
    step = train_step(plan, loss, init, batch(), SGD, mesh=plan.make_mesh())
    few = Mesh(np.array(jax.devices()[:4]), ("x",))
    with jax.set_mesh(few):
        for call in (step.init, jax.jit(lambda _: plan.apply(loss)(params, batch()))):
            with pytest.raises(UserError, match=r"jax\.set_mesh has set has 4 devices, the plan's 8"):
                call(jax.random.key(0))
    there = jax.device_put(batch(), NamedSharding(few, PartitionSpec()))
    for call in (step.evaluate, plan.apply(loss)):
        with pytest.raises(UserError, match="'x' of the batch was put on other devices"):
            call(params, there)
    with pytest.raises(UserError, match="batch array"):
        plan.apply(loss)(params, {})
    with pytest.raises(UserError, match="is no training state: it lacks optimizer, params, step"):
        step.update(batch(), batch())


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"mesh": [8]}, "is no mapping, such as"),
        ({"mesh": {"data": "8"}}, "'data' is '8': no whole number"),
        ({"rules": "w"}, "is no mapping, such as"),
        ({"microbatches": "2"}, "microbatches='2' must be a whole number"),
        ({"attention": 3}, "must be the name of a kernel"),
        ({"recognise": 3}, "must be some of attention"),
        ({"optimizer": optax.adam}, "is none of optax's"),
        ({"attention": []}, "must be the name of a kernel"),
        ({"rules": 0}, "is no mapping, such as"),
        ({"remat": ""}, "remat='' is not a policy"),
        ({"remat": {"up": "device"}}, "this program has no scan over layers"),
        ({"context": np.ones(3)}, "is no way of attention over context"),
        ({"calibration": 3}, "is no file of `meshwright calibrate`"),
        ({"accumulation": ["exact"]}, "is unknown; "),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_arguments_of_another_kind_are_one_sentence(how: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        planned(**how)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda plan, _: plan.compare(3), "B=3 is no plan"),
        (lambda plan, _: plan.explain(3), "subject=3 is no name"),
        (lambda plan, _: plan.bytes_per_device("zz"), "kind='zz' is unknown; known: params, batch, state"),
        (lambda plan, _: plan.check_arrays("param", {}), "kind='param' is unknown; did you mean 'parameter'"),
        (lambda plan, _: plan.shardings({}, "mesh"), "mesh='mesh' is no mesh; give it plan.make_mesh"),
        (lambda plan, _: plan.specs({"w": "text"}), "array 'w' is the text 'text'"),
        (lambda plan, _: plan.axes_of_dims(None), "program=None is no program"),
        (lambda plan, _: plan.make_mesh(3), "devices=3 is no list of JAX's devices"),
        (lambda plan, _: plan.make_mesh([0, 1]), r"devices=\[0, 1\] is no list of JAX's devices"),
        (lambda plan, _: plan.apply(3), "loss=3 is no function of"),
        (lambda plan, _: plan.init(None, jax.random.key(0), SGD), "init=None is no function of a key"),
        (lambda plan, _: plan.init(lambda: {}, jax.random.key(0), SGD), "is no function of a key"),
        (lambda plan, _: plan.init(init, 0, SGD), "key=0 is no key of JAX's"),
        (lambda plan, _: plan.train_step(loss, 3), "optimizer=3 is none of optax's"),
        (lambda plan, _: plan.save(3), "path=3 is no file to write a plan to"),
        (lambda plan, tmp: plan.save(tmp), "cannot be written: Is a directory"),
        (lambda plan, tmp: plan.save(tmp / "none" / "p.json"), "No such file or directory"),
        (lambda *_: Plan.of(3), "record=3 is no plan"),
        (lambda *_: Topology.of([None]), r"devices=\[None\] is no list"),
        (lambda *_: make_mesh(["data"]), "axes=.* is no mapping"),
        (lambda *_: Rules({}).idle_axes(None), "mesh=None is neither a mesh nor axis → size"),
        (lambda *_: Rules({}).specs({}, {"data": 0}), "gives 'data' the size 0; write a whole number from 1"),
        (lambda *_: Rules({}).spec(3, (8,), {}), "names=3 is no sequence with an entry for each"),
        (lambda *_: Rules({}).spec(("embed",), ("a",), {}), "is no shape, such as"),
        (lambda *_: Rules({}).specs({}, {}, 3), "the names at '' are 3, not a tuple"),
    ],
)
def test_what_is_no_such_thing_is_one_sentence(call: Any, says: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=says):
        call(_PLANNED(), tmp_path)


_PLANNED = functools.cache(planned)


def test_calls_of_other_arguments_are_one_sentence() -> None:
    plan, params = planned(), init(jax.random.key(0))
    made = plan.apply(loss)
    assert made(params, batch=batch()) == made(params, batch())
    for call, says in (
        (lambda: made(params), "the planned loss takes .parameters, batch. and was given 1 argument$"),
        (lambda: made(params, batch(), 3), "was given 3 arguments"),
        (lambda: made(params, rows=batch()), "the planned loss cannot be called so"),
        (lambda: made(jax.eval_shape(init, jax.random.key(0)), batch()), "is a ShapeDtypeStruct"),
        (lambda: made(params, {"x": np.ma.array(batch()["x"])}), "is a masked array"),
        (lambda: jax.pmap(made, in_axes=(None, 0))(params, {"x": np.ones((8, 2, 8))}), "jax.pmap .over"),
        (lambda: planned(params={1: 2, "a": 3}), "keys of several kinds"),
        (lambda: planned(params=None), "params=None is no tree of arrays"),
    ):
        with pytest.raises(UserError, match=says):
            call()


def test_states_of_another_making_are_one_sentence() -> None:
    plan, adam = planned(), optax.adam(1e-3)
    step, state = plan.train_step(loss, adam), plan.init(init, jax.random.key(0), adam)
    for wrong, says in (
        ({**state, "ema": 1.0}, "the training state has 'ema'"),
        (plan.init(init, jax.random.key(0), SGD), "it keeps nothing, where this one keeps ScaleByAdamState"),
    ):
        with pytest.raises(UserError, match=says):
            step(wrong, batch())
    with pytest.raises(UserError, match=r"it takes \(state, batch\) and was given 1 argument$"):
        step(state)
    # Plain SGD would carry these along and leave them as they are.
    with pytest.raises(UserError, match=r"keeps ScaleByAdamState \(count, mu, nu\), where this one keeps no"):
        plan.train_step(loss, SGD)(state, batch())
    with pytest.raises(UserError, match="it cannot be called so: missing a required argument: 'batch'"):
        step(state, rows=batch())
    step(batch=batch(), state=state)
    with pytest.raises(UserError, match="this state was given to an earlier step"):
        step(state, batch=batch())


def test_an_optimizer_that_fails_is_one_sentence() -> None:
    plan, ahead = planned(), optax.lookahead(SGD, 2, 0.5)
    with pytest.raises(UserError, match=r"the optimizer's own update fails .*: AttributeError: .*'fast'"):
        plan.train_step(loss, ahead)(plan.init(init, jax.random.key(0), ahead), batch())
    picky = optax.GradientTransformation(lambda params: params["b"], SGD.update)
    with pytest.raises(UserError, match=r"the optimizer's own init fails .*: KeyError: 'b'"):
        planned(optimizer=picky)
    with pytest.raises(UserError, match="the optimizer's own init fails"):
        plan.init(init, jax.random.key(0), picky)
