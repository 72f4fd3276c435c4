"""Losses under microbatches: the whole batch's value, aux and gradients by both doors, or one sentence."""

from __future__ import annotations

import functools

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.sharding import UserError, declare, plan, train_step

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

ROWS, TIME, WIDTH, CLASSES = 16, 4, 16, 4


def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "inside": draws.normal(keys[0], (WIDTH, WIDTH)) / 4,
        "layers": draws.normal(keys[1], (3, WIDTH, WIDTH)) / 4,
        "outside": draws.normal(keys[2], (WIDTH, CLASSES)) / 4,
    }


def batch():
    keys = jax.random.split(jax.random.key(1), 2)
    lengths = jnp.arange(ROWS) * 7 % (TIME + 1)
    return {
        "x": draws.normal(keys[0], (ROWS, TIME, WIDTH)),
        "y": jax.random.randint(keys[1], (ROWS, TIME), 0, CLASSES),
        "counts": (jnp.arange(TIME) < lengths[:, None]) * 1.0,
    }


def logits(p, b):
    return jnp.tanh(b["x"] @ p["inside"]) @ p["outside"]


def each(p, b):
    return optax.softmax_cross_entropy_with_integer_labels(logits(p, b), b["y"])


def a_sum(p, b):
    return each(p, b).sum()


def a_masked_mean(p, b):
    aux = {"counted": b["counts"].sum(dtype=int), "each": each(p, b), "any": (b["counts"] > 0).any(axis=1)}
    return (each(p, b) * b["counts"]).sum() / b["counts"].sum(), aux


def two_denominators(p, b):
    return each(p, b).mean() + (each(p, b) * b["counts"]).sum() / b["counts"].sum()


def row_numbers_and_a_literal(p, b):
    noise = jax.random.normal(jax.random.key(3), (ROWS, TIME))
    return (each(p, b) * (jnp.arange(ROWS)[:, None] + noise)).sum() / ROWS


def a_flood(p, b):
    return jnp.abs(each(p, b).mean() - 1.5) + 1.5


def free_bits(p, b):
    return jnp.maximum(logits(p, b).mean((0, 1)), 0.05).sum() + each(p, b).mean()


def balanced_layers(p, b):
    @jax.checkpoint
    def layer(h, w):
        gate = jax.nn.softmax(h @ w)
        share = jax.nn.one_hot(gate.argmax(-1), WIDTH).mean((0, 1))
        return h + jnp.tanh(h @ w), WIDTH * jnp.sum(share * gate.mean((0, 1)))

    h, balance = jax.lax.scan(layer, b["x"] @ p["inside"], p["layers"])
    return jnp.square(h).mean() + 0.1 * balance.sum(), {"balance": balance}


def the_worst(p, b):
    return each(p, b).max()


def a_gradient_of_its_own(p, b):
    @jax.custom_vjp
    def scaled(x, w):
        return jnp.tanh(x @ w)

    # Its rows are those of the whole batch, also where a part of it is differentiated.
    scaled.defvjp(
        lambda x, w: (scaled(x, w), (x, w)),
        lambda kept, g: (g @ kept[1].T, jnp.einsum("btd,bth->dh", kept[0], g) / kept[0].shape[0]),
    )
    return jnp.square(jax.nn.relu(scaled(b["x"], p["inside"]))).sum()


def a_median_beside_it(p, b):
    return each(p, b).mean(), {"median": jnp.median(each(p, b).sum(-1)), "each": each(p, b)}


def length_of_a_complex_sum(p, b):
    """One number whose gradient is two numbers: it is not added up first and multiplied at the end."""
    return jnp.abs(jnp.exp(1j * each(p, b)).sum())


def picked_by_row_and_place(p, b):
    return -jax.nn.log_softmax(logits(p, b))[jnp.arange(ROWS)[:, None], jnp.arange(TIME), b["y"]].mean()


def two_views_and_halves(p, b):
    """Rows joined with rows, of another array or again the same, and taken apart alike for every part."""
    views = jnp.concatenate([b["x"], 0.5 * b["x"][:, ::-1]])
    one, other = jnp.split(jnp.tanh(views @ p["inside"]), 2)
    twice = jnp.tile(one.sum(1), (2, 1))[ROWS // 2 : ROWS] * other[: ROWS // 2].sum(1)
    padded = jnp.pad(twice, ((0, ROWS // 2), (0, 0)), constant_values=0.3)
    apart = jnp.square(one - other).mean((1, 2)) + (padded * b["counts"].sum(1)[:, None]).sum(1)
    return jnp.repeat(apart, 3)[1::3].mean(), {"first": one[0], "pair": other[3:6:2] > 0}


def kept_in_a_reference(p, b):
    """Sums and rows written to mutable arrays, in a loop too."""
    total, rows = jax.new_ref(jnp.zeros(())), jax.new_ref(jnp.zeros((ROWS, TIME)))

    def turn(n, carry):
        total[...] += jnp.square(jnp.tanh(b["x"] @ p["layers"][n])).mean()
        return carry

    jax.lax.fori_loop(0, 3, turn, 0)
    rows[...] = each(p, b)
    return total[...] + rows[...].mean(), {"each": rows[...]}


def normalised_advantages(p, b):
    """Advantages out of the value that is learnt, normalised over the batch, as in PPO."""
    values = logits(p, b)[..., 0]
    given = b["counts"] - jax.lax.stop_gradient(values)
    given = (given - given.mean()) / (given.std() + 1e-8)
    return jnp.square(values - 1).mean() - (given * jnp.exp(-each(p, b))).mean()


ACCEPTED = (
    pytest.param(normalised_advantages, marks=pytest.mark.slow),
    kept_in_a_reference,
    picked_by_row_and_place,
    two_views_and_halves,
    a_sum,
    a_masked_mean,
    two_denominators,
    row_numbers_and_a_literal,
    a_flood,
    free_bits,
    balanced_layers,
    the_worst,
    length_of_a_complex_sum,
    a_gradient_of_its_own,
    a_median_beside_it,
)


def doors(loss, parts, **more):
    shapes = jax.eval_shape(params), jax.eval_shape(batch)
    names = {"inside": ("embed", "mlp"), "layers": (None, "embed", "mlp"), "outside": ("embed", None)}
    given = {"topology": "cpu:8", "microbatches": parts, **more}
    yield declare(loss, *shapes, mesh={"fsdp": 4, "tensor": 2}, names=names, **given)
    yield plan(loss, *shapes, **given)


# Numbers are what is looked at here, not seconds: a third of the compiler's time is saved.
QUICKLY = {"xla_backend_optimization_level": 0}


def both(loss):
    def function(p, b):
        found = loss(p, b)
        return found if isinstance(found, tuple) else (found, {})

    return jax.jit(jax.value_and_grad(function, has_aux=True), compiler_options=QUICKLY)


@pytest.mark.parametrize("loss", ACCEPTED, ids=lambda loss: loss.__name__)
def test_parts_give_the_value_aux_and_gradients_of_the_whole_batch(loss):
    want = both(loss)(params(), batch())
    for made in doors(loss, 2):
        got = both(made.apply(loss))(params(), batch())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, want)
        assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, want)
    value = jax.jit(made.apply(loss), compiler_options=QUICKLY)(params(), batch())
    np.testing.assert_allclose(value[0] if isinstance(value, tuple) else value, want[0][0], rtol=1e-5)


def contrastive(p, b):
    z = b["x"][:, 0] @ p["inside"]
    return -jnp.diag(jax.nn.log_softmax(z @ b["x"][:, 1].T)).mean()


def sorted_losses(p, b):
    return jnp.sort(each(p, b).sum(-1))[:4].mean()


def a_state_walked_along_the_rows(p, b):
    return jax.lax.scan(lambda s, x: (0.9 * s + jnp.sum(x @ p["inside"]), None), 0.0, b["x"])[0]


def normalised_twice(p, b):
    h = b["x"]
    for _ in range(2):
        h = jnp.tanh(h @ p["inside"])
        h = (h - h.mean((0, 1))) / (h.std((0, 1)) + 1e-3)
    return jnp.square(h @ p["outside"]).mean()


def clipped_weights(p, b):
    """The gradient of shared weights is clipped: not what clipping each part's share of it adds up to."""

    @jax.custom_vjp
    def clipped(w):
        return w

    clipped.defvjp(lambda w: (w, None), lambda _, g: (jnp.clip(g, -1e-2, 1e-2),))
    return jnp.square(jnp.tanh(b["x"] @ clipped(p["inside"]))).mean()


def scale_by_gradient(p, b):
    """A "gradient" that is no gradient: what takes the parameter's place, whatever comes back."""

    @jax.custom_vjp
    def scaled(w, scale):
        return w

    scaled.defvjp(lambda w, scale: (w, w), lambda w, g: (g, jnp.abs(w).max()))
    h = b["x"]
    for w in p["layers"]:
        h = jnp.tanh(h @ scaled(w, p["outside"][0, 0]))
    return jnp.square(h).mean()


def drawn_by_place(p, b):
    return jax.random.gamma(jax.random.key(2), jnp.exp(jnp.tanh(b["x"] @ p["inside"]))).mean()


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (clipped_weights, "is not linear in what comes back .*, at "),
        (scale_by_gradient, "is not linear in what comes back .*, at "),
        (drawn_by_place, "random_gamma draws each example's number by its place among all, at "),
        (contrastive, "every example meets every other, at "),
        (sorted_losses, "some of the examples that a sort has moved are cut out, at "),
        (a_state_walked_along_the_rows, "what is carried is more than a sum, at "),
        (normalised_twice, "passes over the batch, since sums over the examples wait for one another"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_does_not_come_in_parts_is_refused_by_both_doors_with_one_sentence(loss, says):
    said = []
    shapes = jax.eval_shape(params), jax.eval_shape(batch)
    for door in (functools.partial(declare, mesh={"data": 8}), plan):
        with pytest.raises(UserError, match=says) as caught:
            door(loss, *shapes, topology="cpu:8", microbatches=2)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert f"({loss.__name__})" in said[0]
    assert "accumulation='by part'" in said[0]


def test_rows_are_told_from_keys_and_tables_by_what_the_loss_does_of_them():
    def weighed(p, b):
        kept = jax.random.bernoulli(b["a key"], 0.9, b["x"].shape)
        by = (b["bias"] + b["weights"])[b["y"]]
        each = optax.softmax_cross_entropy_with_integer_labels(logits(p, {"x": b["x"] * kept}), b["y"])
        return (each * by).sum() / by.sum()

    # Tables of as many classes as rows, more of them than examples, and a key before all.
    p = {**params(), "outside": draws.normal(jax.random.key(5), (WIDTH, ROWS)) / 4}
    table = jnp.arange(1.0, 1 + ROWS)
    b = {**batch(), "weights": table, "bias": table[::-1] ** 2, "a key": jax.random.PRNGKey(4)}
    b = {name: b[name] for name in ("x", "y", "weights", "bias", "a key")}
    longer = {**b, "weights": jnp.tile(table, 2), "bias": jnp.tile(table, 2) ** 2}
    for one in (b, longer):
        made = declare(weighed, p, one, topology="cpu:8", mesh={"data": 8}, microbatches=2)
        want, got = both(weighed)(p, one), both(made.apply(weighed))(p, one)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, want)


@pytest.mark.once("sharding/transform/accumulation/test_by_part.py")
def test_what_is_refused_is_taken_by_part_if_that_is_asked_and_the_plan_says_so():
    for made in doors(contrastive, 2, accumulation="by part"):
        assert any("the mean of what the parts give" in note for note in made.notes)
        b = batch()
        halves = [jax.tree.map(lambda leaf: leaf[n::2], b) for n in range(2)]  # noqa: B023
        want = sum(jax.jit(contrastive)(params(), half) for half in halves) / 2
        np.testing.assert_allclose(jax.jit(made.apply(contrastive))(params(), b), want, rtol=1e-5)
        assert type(made).from_dict(made.to_dict()).accumulation == "by part"


def test_sums_that_no_gradient_goes_through_take_a_pass_forward_each():
    shapes = jax.eval_shape(params), jax.eval_shape(batch)
    made = declare(normalised_advantages, *shapes, topology="cpu:8", mesh={"data": 8}, microbatches=2)
    assert any("take 3 passes" in note for note in made.notes)


@pytest.mark.once("sharding/transform/accumulation/test_run.py")
def test_more_passes_may_be_allowed():
    def normalised(p, b):
        h = b["x"] @ p["inside"]
        h = (h - h.mean((0, 1))) / (h.std((0, 1)) + 1e-3)
        return jnp.square(jnp.tanh(h) @ p["outside"]).mean()

    shapes = jax.eval_shape(params), jax.eval_shape(batch)
    with pytest.raises(UserError, match=r"it takes 5 passes .* max_passes=5 takes them"):
        plan(normalised, *shapes, topology="cpu:8", microbatches=2)
    made = plan(normalised, *shapes, topology="cpu:8", microbatches=2, max_passes=5)
    assert any("take 5 passes" in note for note in made.notes)
    want, got = both(normalised)(params(), batch()), both(made.apply(normalised))(params(), batch())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, want)


@pytest.mark.once("sharding/transform/accumulation/test_run.py")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_narrow_gradients_are_added_up_in_float32(dtype):
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), params())

    def loss(p, b):
        return each(p, b).astype(jnp.float32).mean()

    made = declare(
        loss, narrow, jax.eval_shape(batch), topology="cpu:8", mesh={"data": 1, "tensor": 8}, microbatches=16,
        names={"inside": ("embed", "mlp"), "layers": (None, "embed", "mlp"), "outside": ("mlp", None)},
    )  # fmt: skip
    exact = jax.jit(jax.grad(loss))(params(), batch())
    whole, parts = (jax.jit(jax.grad(one))(narrow, batch()) for one in (loss, made.apply(loss)))

    def apart(found):
        return float(jnp.linalg.norm(found["inside"].astype(jnp.float32) - exact["inside"]))

    assert parts["inside"].dtype == dtype
    assert apart(parts) < 2 * apart(whole)


@pytest.mark.once("sharding/transform/accumulation/test_run.py")
def test_a_number_of_pythons_is_a_parameter_like_any():
    def loss(p, b):
        return (b["x"][:, 0] @ p["w"] * p["scale"]).mean()

    p = {"w": jnp.arange(1.0, 1 + WIDTH), "scale": 1.5}
    made = declare(loss, p, batch(), topology="cpu:8", mesh={"data": 8}, microbatches=2)
    got, want = jax.grad(made.apply(loss))(p, batch()), jax.jit(jax.grad(loss))(p, batch())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_complex_parameters_have_their_gradients():
    phases = {"turn": jnp.exp(1j * jnp.arange(WIDTH))}

    def loss(p, b):
        return jnp.abs(jnp.sum(b["x"] * p["turn"], -1)).mean()

    shapes = jax.eval_shape(lambda: phases), jax.eval_shape(batch)
    made = plan(loss, *shapes, topology="cpu:8", microbatches=2)
    want, got = jax.grad(loss)(phases, batch()), jax.jit(jax.grad(made.apply(loss)))(phases, batch())
    np.testing.assert_allclose(got["turn"], want["turn"], rtol=1e-5)
    assert np.abs(want["turn"]).min() > 0


def test_a_state_is_the_one_that_the_whole_batch_leaves():
    def loss(p, b, state):
        h = b["x"] @ p["inside"]
        seen = {"mean": 0.9 * state["mean"] + 0.1 * h.mean((0, 1)), "steps": state["steps"] + 1}
        return jnp.square(h - state["mean"]).mean(), ({"rows": h.sum((1, 2))}, seen)

    state = {"mean": jnp.ones(WIDTH), "steps": jnp.int32(4)}
    made = plan(loss, params(), batch(), topology="cpu:8", microbatches=2, state=state)
    want = jax.jit(jax.value_and_grad(loss, has_aux=True))(params(), batch(), state)
    got = jax.jit(jax.value_and_grad(made.apply(loss), has_aux=True))(params(), batch(), state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_a_key_that_a_checkpoint_hands_on_is_kept():
    def loss(p, b, key):
        @jax.checkpoint
        def layer(x, key):
            key, now = jax.random.split(key)
            return jnp.tanh(x @ p["inside"]) * jax.random.bernoulli(now, 0.9, x.shape), key

        x, key = layer(b["x"], key)
        return jnp.square(x).mean(), ({}, key)

    key = jax.random.key(3)
    given = {"topology": "cpu:8", "mesh": {"data": 8}, "microbatches": 2, "state": key}
    made = declare(loss, params(), batch(), **given)
    (got, (_, kept)), (want, (_, left)) = (
        jax.jit(f)(params(), batch(), key) for f in (made.apply(loss), loss)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert kept == left


@pytest.mark.once("sharding/transform/accumulation/test_region.py")
def test_what_is_worked_through_by_hand_after_the_gradient_leaves_a_state_too():
    def loss(p, b, state):
        taught = jax.lax.stop_gradient(jnp.tanh(b["other"] @ p["inside"]) @ p["outside"])
        learnt = jax.nn.log_softmax(jnp.tanh(b["one"] @ p["inside"]) @ p["outside"])
        value = -jnp.sum(jax.nn.softmax(taught - state) * learnt, -1).mean()
        return value, ({"spread": taught.std(0).mean()}, 0.9 * state + 0.1 * taught.mean(0))

    views, state = {"one": batch()["x"][:, 0], "other": batch()["x"][:, 1]}, jnp.zeros(CLASSES)
    given = {"topology": "cpu:8", "mesh": {"data": 4, "fsdp": 2}, "microbatches": 2, "state": state}
    made = declare(loss, params(), views, **given)
    want, (aux, left) = loss(params(), views, state)
    mesh = made.make_mesh()
    step = train_step(made, loss, lambda _: (params(), state), views, optax.sgd(0.1), mesh=mesh)
    after, metrics = step.update(step.init(jax.random.key(0)), views)
    np.testing.assert_allclose([metrics["loss"], metrics["spread"]], [want, aux["spread"]], rtol=1e-4)
    np.testing.assert_allclose(after["state"], left, rtol=1e-4, atol=1e-5)


def test_a_loss_with_a_state_is_not_sent_to_what_it_cannot_have() -> None:
    def ranked(params, batch, state):
        best = jnp.sort(batch @ params)[-3:]
        return best.mean(), ({}, state + 1)

    shape = jax.ShapeDtypeStruct
    with pytest.raises(UserError, match="some of the examples that a sort has moved are cut out") as error:
        declare(
            ranked,
            shape((4,), "float32"),
            shape((16, 4), "float32"),
            topology="cpu:8",
            mesh={"data": 8},
            microbatches=2,
            state=shape((), "int32"),
        )
    assert "by part" not in str(error.value)
