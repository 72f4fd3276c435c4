"""Which dimension of a stored parameter is cut: parts of whole tiles, by rows where that can be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from meshwright.sharding.planner.choices.storage import store
from meshwright.sharding.program import trace


def cut(shape: tuple[int, ...], fsdp: int, stacked: bool = True) -> int | None:
    """Return the dimension of a layer's parameter that 'fsdp' cuts, counted without that of the layers."""

    def loss(params, batch):
        def layer(x, weight):
            return x + jnp.tanh(x @ weight.reshape(weight.shape[0], -1)).sum(), None

        x = batch["x"]
        x = jax.lax.scan(layer, x, params)[0] if stacked else layer(x, params)[0]
        return x.mean()

    layers = (2,) if stacked else ()
    program = trace(
        loss,
        jax.ShapeDtypeStruct((*layers, *shape), "float32"),
        {"x": jax.ShapeDtypeStruct((fsdp, shape[0]), "float32")},
    )
    stored = store(program, {"fsdp": fsdp}, {}, over=["fsdp"], declared={}, tile_rows=16)
    (storage,) = stored.params.values()
    places = [n - len(layers) for n, axes in enumerate(storage) if axes == ("fsdp",)]
    return places[0] if places else None


@pytest.mark.parametrize(
    ("shape", "fsdp", "dimension"),
    [
        ((4096, 14336), 64, 0),  # both leave whole tiles: rows
        ((14336, 4096), 64, 0),
        ((11008, 4096), 64, 1),  # 172 rows are no whole tiles, 64 columns are
        ((4096, 14336), 256, 0),
        ((14336, 4096), 256, 1),
        ((64, 128, 8192), 64, 0),  # a dimension before the last two may be cut anywhere
        ((32, 128, 4096), 64, 2),  # 32 heads do not divide
        ((24, 40), 8, 1),  # neither does: the larger
        ((30, 50), 8, None),
    ],
)
def test_the_dimension_that_is_cut(shape, fsdp, dimension):
    assert cut(shape, fsdp) == dimension
    assert cut(shape, fsdp, stacked=False) == dimension
