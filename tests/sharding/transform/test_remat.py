import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import UserError
from meshwright.sharding.plans.vocabulary import PLACES, REMATS
from meshwright.sharding.program.jaxpr import Traces
from meshwright.sharding.program.layers import INPUT, marks_of
from meshwright.sharding.transform import remat as transform
from meshwright.sharding.transform.compose import composed
from meshwright.sharding.transform.remat import Name, Remat

LAYERS, WIDTH, ROWS = 6, 64, 128


def remat(function, policy, saved=None):
    """Return `function` with the passes that say what its layers keep."""

    def passes(program, params):
        names = [Name(marks_of(program, saved), inputs=INPUT in saved)] if saved else []
        return [*names, Remat(program, policy, saved)]

    return function if policy == "none" else composed(Traces(function), passes)


def test_the_policies_and_places_are_those_that_a_plan_may_hold():
    assert tuple(transform.POLICIES) == REMATS
    assert tuple(transform.PLACES) == PLACES


def loss(params, x):
    def layer(x, weight):
        return x + jnp.tanh(jax.nn.gelu(x @ weight)), None

    x, _ = jax.lax.scan(layer, x, params)
    return jnp.square(x).mean()


@pytest.fixture
def arrays():
    keys = jax.random.split(jax.random.key(0))
    return 0.1 * draws.normal(keys[0], (LAYERS, WIDTH, WIDTH)), draws.normal(keys[1], (256, WIDTH))


@pytest.mark.numerics
@pytest.mark.parametrize("policy", ["none", "dots", "full"])
def test_values_and_gradients_are_those_of_the_function(arrays, policy):
    expected = jax.jit(jax.value_and_grad(loss))(*arrays)
    got = jax.jit(jax.value_and_grad(remat(loss, policy)))(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, expected)


def saved_bytes(function, arrays):
    return jax.jit(jax.grad(function)).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def test_each_policy_keeps_less_than_the_one_before(arrays):
    kept = {policy: saved_bytes(remat(loss, policy), arrays) for policy in ("none", "dots", "full")}
    assert kept["full"] < kept["dots"] < kept["none"]


def test_layers_inside_a_jitted_function_are_found(arrays):
    assert saved_bytes(remat(jax.jit(loss), "full"), arrays) < saved_bytes(remat(loss, "none"), arrays)


def test_a_users_own_checkpoint_is_left_alone(arrays):
    def own(params, x):
        layer = jax.checkpoint(lambda x, weight: (x + jnp.tanh(x @ weight), None))
        return jnp.square(jax.lax.scan(layer, x, params)[0]).mean()

    program = str(jax.make_jaxpr(remat(own, "full"))(*arrays))
    assert program.count("remat2") == 1


def test_a_users_own_checkpoint_is_left_alone_beside_what_is_cheap(arrays):
    """As constraints on what a loop carries are, which stand there when layers are chosen."""

    def own(params, x):
        layer = jax.checkpoint(lambda x, weight: x + jnp.tanh(x @ weight))
        return jnp.square(jax.lax.scan(lambda x, w: (layer(jnp.sin(x), w), None), x, params)[0]).mean()

    program = str(jax.make_jaxpr(remat(own, "dots"))(*arrays))
    assert program.count("remat2") == 1


def test_a_function_without_scanned_layers_is_refused(arrays):
    with pytest.raises(UserError, match="remat='full' works on scanned layers"):
        remat(lambda params, x: (x @ params[0]).sum(), "full")(*arrays)


def test_an_unknown_policy_is_refused_with_the_nearest(arrays):
    with pytest.raises(UserError, match="remat='ful' is not a policy; did you mean 'full'"):
        remat(loss, "ful")(*arrays)


def test_source_lines_survive(arrays):
    text = jax.jit(remat(loss, "full")).lower(*arrays).as_text(debug_info=True)
    assert "test_remat.py" in text


def test_what_a_layer_checkpoints_itself_is_not_kept(arrays):
    def scored(params, x):
        def layer(x, weight):
            @jax.checkpoint
            def scores(y):
                return jax.nn.softmax(y @ y.T) @ y

            return x + scores(x @ weight), None

        return jnp.square(jax.lax.scan(layer, x, params)[0]).mean()

    plain, kept = saved_bytes(scored, arrays), saved_bytes(remat(scored, "none"), arrays)
    assert kept <= plain


def wide(params, batch):
    """Layers whose products differ in size: ``up`` is four times as wide as ``down``."""

    def layer(x, weights):
        return x + jnp.tanh(x @ weights["up"]) @ weights["down"], None

    return jnp.square(jax.lax.scan(layer, batch, params["layers"])[0]).mean()


@pytest.fixture
def wide_arrays():
    keys = jax.random.split(jax.random.key(1), 3)
    up = 0.1 * draws.normal(keys[0], (LAYERS, WIDTH, 4 * WIDTH))
    down = 0.1 * draws.normal(keys[1], (LAYERS, 4 * WIDTH, WIDTH))
    return {"layers": {"up": up, "down": down}}, draws.normal(keys[2], (ROWS, WIDTH))


def stacked(function, arrays):
    """Return the shapes of what the scan over layers keeps for the backward pass, without the layers."""
    program = jax.make_jaxpr(lambda *args: jax.vjp(function, *args)[1])(*arrays)
    kept = [v.aval.shape for v in program.jaxpr.outvars]
    return sorted(shape[2] for shape in kept if len(shape) == 3 and shape[:2] == (LAYERS, ROWS))


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("names", "kept"),
    [
        ([], [WIDTH]),
        (["up"], [WIDTH, 4 * WIDTH]),
        # What is only added to the stream is needed by no gradient.
        (["down"], [WIDTH]),
    ],
)
def test_named_values_are_kept_and_no_others(wide_arrays, names, kept):
    function = remat(wide, "names", dict.fromkeys(names, "device"))
    assert stacked(function, wide_arrays) == kept
    expected = jax.jit(jax.value_and_grad(wide))(*wide_arrays)
    got = jax.jit(jax.value_and_grad(function))(*wide_arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, expected)


@pytest.mark.numerics
def test_named_values_can_lie_on_the_host(wide_arrays):
    saved = {"up": "host", INPUT: "host"}
    function = remat(wide, "names", saved)
    text = str(jax.make_jaxpr(jax.grad(function))(*wide_arrays))
    assert "host" in text
    got = jax.jit(jax.value_and_grad(function))(*wide_arrays)
    expected = jax.jit(jax.value_and_grad(wide))(*wide_arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, expected)


def test_a_name_that_no_layer_has_is_refused(wide_arrays):
    with pytest.raises(UserError, match="no layer has a value named 'upp'; did you mean 'up'"):
        remat(wide, "names", {"upp": "device"})(*wide_arrays)
    with pytest.raises(UserError, match="up: 'hots' is no place to keep a value; did you mean 'host'"):
        remat(wide, "names", {"up": "hots"})(*wide_arrays)
