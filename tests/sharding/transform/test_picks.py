"""Look-ups with rows of their own in logits that are cut along sequence and vocabulary at once."""

from __future__ import annotations

from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import declare

VOCAB, WIDTH, ROWS, TIME = 32, 16, 8, 16
NAMES = {"table": ("vocab", "embed"), "layers": ("layers", "embed", "inner"), "out": ("embed", "vocab")}


def init() -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"table": (VOCAB, WIDTH), "layers": (4, WIDTH, WIDTH), "out": (WIDTH, VOCAB)}
    return {
        name: draws.normal(key, shape) / 4 for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def batch() -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, ROWS, TIME)).astype(np.int32)
    return dict(zip(("tokens", "targets"), ids, strict=True))


def one_target(logits: Any, targets: Any) -> Any:
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - chosen


def several_of_which_some_are_outside(logits: Any, targets: Any) -> Any:
    others = jnp.stack([targets, -targets - 1, targets + VOCAB - 2], -1)
    clipped = jnp.take_along_axis(logits, others, -1, mode="clip")
    filled = jnp.take_along_axis(logits, others, -1, mode="fill", fill_value=0.5)
    signs = jnp.take_along_axis((logits > 0).astype(jnp.int32), others, -1, mode="clip")
    return jnp.square(clipped).mean() + filled.sum(-1) * signs.mean()


def by_vmap(logits: Any, targets: Any) -> Any:
    each = jax.vmap(jax.vmap(lambda row, place: row[place]))(logits, targets)
    columns = jax.vmap(lambda row, place: row[:, place])(logits, targets[:, 0])
    return jnp.square(each) + jax.vmap(lambda row, place: row.T[place])(logits, targets).mean() * columns


def slices(logits: Any, targets: Any) -> Any:
    of_row = jax.vmap(lambda row, place: jax.lax.dynamic_slice(row, (0, place), (TIME, 3)))
    return jnp.square(of_row(logits, targets[:, 0]))


def loss_of(each: Any) -> Any:
    def loss(params: Any, batch: Any) -> Any:
        x = params["table"][batch["tokens"]]
        x, _ = jax.lax.scan(lambda x, own: (x + jnp.tanh(x @ own), None), x, params["layers"])
        return each(x @ params["out"], batch["targets"]).mean()

    return loss


@pytest.mark.numerics
@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("each", "axis"),
    [
        (one_target, "stage"),
        (several_of_which_some_are_outside, "data"),
        (by_vmap, "data"),
        (slices, "data"),
    ],
)
def test_what_is_picked_is_the_plain_functions_within_a_region_by_hand(each: Any, axis: str) -> None:
    loss, params = loss_of(each), init()
    made = declare(
        *(loss, params, batch()),
        **{"topology": "cpu:8", "names": NAMES, "microbatches": 2},
        mesh={axis: 2, "context": 2, "tensor": 2},
    )
    want, learnt = jax.jit(jax.value_and_grad(loss))(params, batch())
    found, learns = jax.jit(jax.value_and_grad(made.apply(loss)))(params, batch())
    assert abs(found - want) <= 1e-6 * abs(want)
    for name, gradient in learnt.items():
        assert np.linalg.norm(learns[name] - gradient) <= 1e-5 * np.linalg.norm(gradient), name
