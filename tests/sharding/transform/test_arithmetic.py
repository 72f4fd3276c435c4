"""Products and look-ups of 16 bits on GPUs: gradients no less exact than JAX own, odd widths padded."""

import dataclasses
import re

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import Plan, UserError, declare, plan

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

VOCAB, EMBED, ROWS, SEQUENCE = 512, 64, 16, 32
NAMES = {"table": ("vocab", "embed"), "w": ("layers", "embed", "mlp")}
# Few tokens, each of which is read often, as the frequent ones of a text are.
OFTEN = 8


def loss_in(dtype):
    """Return a tied language model's loss that computes in `dtype`."""

    def loss(params, batch):
        table = params["table"].astype(dtype)

        def layer(x, w):
            return x + jnp.tanh(jnp.einsum("bse,ef->bsf", x, w.astype(dtype))), None

        x, _ = jax.lax.scan(layer, table[batch["x"]], params["w"])
        logits = jnp.einsum("bse,ve->bsv", x, table, preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, batch["y"][..., None], -1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)

    return loss


def arrays(vocab=VOCAB):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "table": draws.normal(keys[0], (vocab, EMBED)) * 0.3,
        "w": draws.normal(keys[1], (4, EMBED, EMBED)) * 0.1,
    }
    batch = {
        "x": jax.random.randint(keys[2], (ROWS, SEQUENCE), 0, OFTEN),
        "y": jax.random.randint(keys[3], (ROWS, SEQUENCE), 0, vocab),
    }
    return params, batch


def mesh_of(made: Plan) -> jax.sharding.Mesh:
    auto = (jax.sharding.AxisType.Auto,) * len(made.mesh)
    return jax.make_mesh(tuple(made.mesh.values()), tuple(made.mesh), axis_types=auto)


def errors(found, exact):
    return {n: float(jnp.linalg.norm(found[n] - exact[n]) / jnp.linalg.norm(exact[n])) for n in exact}


@pytest.mark.parametrize(
    ("mesh", "rules", "microbatches"),
    [
        ({"fsdp": 8}, {}, 1),
        ({"data": 2, "tensor": 4}, {"vocab": "tensor"}, 1),
        ({"data": 4, "fsdp": 2}, {}, 2),
    ],
    ids=["columns", "rows cut", "in parts"],
)
def test_gradients_are_no_less_exact_than_as_jax_takes_them(mesh, rules, microbatches):
    params, batch = arrays()
    short = loss_in(jnp.bfloat16)
    exact = jax.jit(jax.grad(loss_in(jnp.float32)))(params, batch)
    value, plain = jax.value_and_grad(short)(params, batch)
    made = declare(
        short,
        params,
        batch,
        topology="h100:1x8",
        mesh=mesh,
        rules=rules,
        names=NAMES,
        microbatches=microbatches,
    )
    assert made.kernels["arithmetic"] == {"products": "operands", "lookups": "float32"}
    found, gradients = jax.jit(jax.value_and_grad(made.apply(short, mesh_of(made))))(params, batch)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    own = errors(plain, exact)
    for name, error in errors(gradients, exact).items():
        assert error < 1.1 * own[name]
    # Sums of many rows in bfloat16 are what JAX's own gradient of the table loses most by.
    assert errors(gradients, exact)["table"] < 0.8 * own["table"]


@pytest.mark.parametrize("devices", [1, 8])
def test_no_product_of_float32_and_no_sum_in_bfloat16_is_left(devices):
    """Of several devices each sums what its own rows read."""
    params, batch = arrays()
    loss = loss_in(jnp.bfloat16)
    texts = {}
    for how in ("auto", "jax"):
        made = declare(
            loss, params, batch, topology=f"h100:1x{devices}", mesh={"data": devices}, arithmetic=how
        )
        texts[how] = jax.jit(jax.grad(made.apply(loss, mesh_of(made)))).lower(params, batch).as_text()
    wide = re.compile(r"stablehlo.dot_general.*: \(tensor<[\dx]*f32>")
    summed = re.compile(r'stablehlo.scatter"(?:.|\n)*?}\) : \(tensor<512x64x(\w+)>')
    assert len(wide.findall(texts["jax"])) == 2
    assert not wide.findall(texts["auto"])
    assert summed.findall(texts["jax"]) == ["bf16"]
    assert summed.findall(texts["auto"]) == ["f32"]


@pytest.mark.once("sharding/transform/test_arithmetic.py")
def test_an_odd_vocabulary_is_padded_within_the_product_alone():
    params, batch = arrays(vocab=1031)
    short = loss_in(jnp.bfloat16)
    made = declare(short, params, batch, topology="h100:1x8", mesh={"fsdp": 8}, names=NAMES)
    assert made.kernels["arithmetic"]["multiple"] == 64
    step = jax.jit(jax.value_and_grad(made.apply(short, mesh_of(made))))
    found, gradients = step(params, batch)
    np.testing.assert_allclose(found, short(params, batch), rtol=1e-5)
    exact = jax.jit(jax.grad(loss_in(jnp.float32)))(params, batch)
    own = errors(jax.grad(short)(params, batch), exact)
    assert all(error < 1.1 * own[name] for name, error in errors(gradients, exact).items())
    products = re.findall(r"stablehlo.dot_general.*", step.lower(params, batch).as_text())
    # The product, and both of its gradients.
    assert sum("1088" in line for line in products) == 3
    assert not any("1031" in line for line in products)
    cut = {"mesh": {"data": 2, "tensor": 4}, "rules": {"vocab": "tensor"}, "names": NAMES}
    even = arrays(vocab=1028)
    assert "multiple" not in declare(short, *even, topology="h100:1x8", **cut).kernels["arithmetic"]


def test_float16_loses_no_small_cotangent():
    params, batch = arrays()
    half = loss_in(jnp.float16)
    made = declare(half, params, batch, topology="h100:1x1", mesh={"fsdp": 1}, names=NAMES)
    assert made.kernels["arithmetic"] == {"lookups": "float32"}


@pytest.mark.once("sharding/transform/test_arithmetic.py")
def test_they_are_a_gpu_s_and_can_be_switched_off(tmp_path):
    params, batch = arrays()
    loss = loss_in(jnp.bfloat16)
    assert "arithmetic" not in plan(loss, params, batch, topology="v5e:2x4").kernels
    assert "arithmetic" not in plan(loss, params, batch, topology="h100:1x8", arithmetic="jax").kernels
    assert "arithmetic" not in plan(loss_in(jnp.float32), params, batch, topology="h100:1x8").kernels
    made = plan(loss, params, batch, topology="h100:1x8")
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    assert "gradients of bfloat16 products in bfloat16" in " ".join(made.explain().split())
    assert "arithmetic" in made.kernels


def test_unknown_words_are_refused():
    params, batch = arrays()
    with pytest.raises(UserError, match=r"arithmetic='fast' .*auto"):
        plan(loss_in(jnp.bfloat16), params, batch, topology="h100:1x8", arithmetic="fast")
    made = plan(loss_in(jnp.bfloat16), params, batch, topology="h100:1x8")
    for written, why in (
        ({"product": "operands"}, "kernels: arithmetic: 'product' is unknown; .*products"),
        ({"products": "bfloat16"}, "arithmetic: products='bfloat16' is unknown; known: operands"),
    ):
        with pytest.raises(UserError, match=why):
            dataclasses.replace(made, kernels={"arithmetic": written})
