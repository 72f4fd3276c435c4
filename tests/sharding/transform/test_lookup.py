"""Large tables that are stored cut by columns: read where they lie, with the values of the whole table."""

from __future__ import annotations

from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.sharding import declare, train_step

ENTRIES, WIDTH, ROWS, PLACES = 4096, 16, 16, 2
NAMES = {"table": ("vocab", "embed"), "out": ("embed", None)}


def init(key: Any, entries: int = ENTRIES) -> dict[str, Any]:
    one, other = jax.random.split(key)
    return {"table": draws.normal(one, (entries, WIDTH)), "out": draws.normal(other, (WIDTH, 4))}


def batch() -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(0, ENTRIES, (ROWS, PLACES)).astype(np.int32)
    # One that several rows have, one that counts from the end and one that no row of the table is.
    ids[:, 0], ids[3, 1], ids[5, 1] = 7, -1, ENTRIES + 5
    return {"ids": ids, "y": np.linspace(-1, 1, ROWS * 4, dtype=np.float32).reshape(ROWS, 4)}


def clipped(params: Any, batch: Any) -> Any:
    found = jnp.tanh(params["table"][batch["ids"]].sum(1)) @ params["out"]
    return jnp.square(found - batch["y"]).mean()


def filled(params: Any, batch: Any) -> Any:
    found = jnp.take(params["table"], batch["ids"], axis=0, mode="fill", fill_value=0.5)
    return jnp.square(found.sum(1) @ params["out"] - batch["y"]).mean()


@pytest.mark.numerics
@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("loss", "how"),
    [
        (clipped, {"mesh": {"fsdp": 8}}),
        (filled, {"mesh": {"data": 2, "fsdp": 4}, "microbatches": 2}),
    ],
    ids=["fsdp", "data and parts"],
)
def test_values_and_gradients_are_those_of_the_whole_table(loss: Any, how: Any) -> None:
    params = init(jax.random.key(0))
    made = declare(loss, jax.eval_shape(lambda: params), batch(), topology="cpu:8", names=NAMES, **how)
    assert tuple(made.params["table"].spec) == (None, "fsdp")
    want = jax.jit(jax.value_and_grad(loss))(params, batch())
    got = jax.jit(jax.value_and_grad(made.apply(loss)))(params, batch())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    assert np.abs(want[1]["table"][7]).min() > 0


def compiled(entries: int) -> Any:
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), entries))
    optimizer = optax.sgd(1e-2)
    made = declare(
        clipped, shapes, batch(), topology="cpu:8", mesh={"fsdp": 8}, names=NAMES, optimizer=optimizer
    )
    step = train_step(
        made, clipped, lambda key: init(key, entries), batch(), optimizer, mesh=made.make_mesh()
    )
    return step.update.lower(step.abstract_state, batch()).compile()


@pytest.mark.devices(8)
def test_a_large_table_is_neither_sent_nor_held_whole() -> None:
    large, small = compiled(1 << 14), compiled(128)
    own = (1 << 14) * WIDTH * 4 // 8
    # The gradient of a device's own columns, and little else.
    assert large.memory_analysis().temp_size_in_bytes < 1.5 * own
    assert "all-to-all(" in large.as_text()
    # Of a small one the rows that are read are as large as the table, which is gathered before they are.
    assert "all-to-all(" not in small.as_text()


def test_a_table_is_priced_as_it_is_read() -> None:
    def priced(entries: int) -> Any:
        shapes = jax.eval_shape(lambda: init(jax.random.key(0), entries))
        how = {"mesh": {"fsdp": 8}, "names": NAMES, "optimizer": optax.sgd(1e-2)}
        return declare(clipped, shapes, batch(), topology="v5e:2x4", **how).estimate

    large, small = priced(1 << 14), priced(128)

    def sent(entries: int) -> float:
        return sum(taken for item, taken in priced(entries).time.items() if item.endswith("/fsdp"))

    large, small = priced(1 << 14), priced(128)
    assert large.memory["communication"] < (1 << 14) * WIDTH * 4 // 8
    assert "all_to_all/fsdp" in large.time
    assert "all_to_all/fsdp" not in small.time
    # Of the table itself nothing travels.
    assert sent(1 << 15) == pytest.approx(sent(1 << 14))
