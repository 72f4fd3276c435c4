"""What a layer's products hold while it goes back, worked out by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from meshwright.sharding import plan

ROWS, SEQUENCE, WIDTH, HIDDEN, LAYERS, WORDS = 16, 64, 256, 1024, 3, 65536

INWARD, OUTWARD = ("layers", "embed", "hidden"), ("layers", "hidden", "embed")
NAMES = {"scale": ("layers", "embed"), "up": INWARD, "gate": INWARD, "down": OUTWARD}
NAMES["words"] = ("embed", "vocabulary")


def layer(x: Any, p: Any) -> tuple[Any, None]:
    taken = x * p["scale"]
    hidden = taken @ p["up"] if "gate" not in p else (taken @ p["gate"]) * (taken @ p["up"])
    return x + jnp.tanh(hidden) @ p["down"], None


def loss(params: Any, batch: Any) -> Any:
    return jnp.square(jax.lax.scan(layer, batch["x"], params["layers"])[0]).mean()


def of_words(params: Any, batch: Any) -> Any:
    y = jax.lax.scan(layer, batch["x"], params["layers"])[0]
    return jax.nn.logsumexp((y @ params["words"]).astype("float32"), axis=-1).mean()


def temporaries(function: Any, topology: str, tensor: int, *, gated: bool = False) -> float:
    shapes = {"scale": (LAYERS, WIDTH), "up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH)}
    if gated:
        shapes["gate"] = shapes["up"]
    layers = {name: jax.ShapeDtypeStruct(shape, "bfloat16") for name, shape in shapes.items()}
    params = {"layers": layers}
    if function is of_words:
        params["words"] = jax.ShapeDtypeStruct((WIDTH, WORDS), "bfloat16")
    batch = {"x": jax.ShapeDtypeStruct((ROWS, SEQUENCE, WIDTH), "bfloat16")}
    names = {"layers": {name: NAMES[name] for name in shapes}, "words": NAMES["words"]}
    made = plan(
        function,
        params,
        batch,
        topology=topology,
        mesh={"fsdp": 8 // tensor, "tensor": tensor},
        rules=dict.fromkeys(("sequence", "hidden", *["vocabulary"] * ("words" in params)), "tensor"),
        names={key: names[key] for key in params},
        remat="full",
        microbatches=1,
    )
    assert made.estimate is not None
    return made.estimate.memory["temporaries"]


def sizes(tensor: int) -> tuple[float, float]:
    """Return the bytes of the stream, whole, and of the hidden values, of a device's rows."""
    rows = ROWS / (8 / tensor) * SEQUENCE * 2
    return rows * WIDTH, rows * HIDDEN / tensor


@pytest.mark.parametrize(("tensor", "sums"), [(4, 5 / 4), (2, 1.0)])
def test_sums_go_round_four_devices_of_a_tpu_in_five_parts_and_are_whole_over_two(
    tensor: int, sums: float
) -> None:
    stream, hidden = sizes(tensor)
    # The layer's input as it lies and what the product gave; what it takes, and the gradient of what it gave.
    held = stream / tensor + hidden + stream + hidden
    # The gradient of the layer's result, gathered, and of what the product takes.
    assert temporaries(loss, "v5e:2x4", tensor) == held + stream + sums * stream


def test_several_products_sums_are_arrays_and_their_own_sum_is_one_on_gpus() -> None:
    stream, hidden = sizes(4)
    held = stream / 4 + 2 * hidden + stream + 2 * hidden
    assert temporaries(loss, "h100:8", 4, gated=True) == held + stream + 3 * stream


def test_a_losss_gradient_is_written_where_its_parts_go_round() -> None:
    logits = ROWS / 2 * SEQUENCE * WORDS / 4 * 4
    whole = temporaries(of_words, "v5e:2x4", 2)
    assert temporaries(of_words, "v5e:2x4", 4) == logits + 1.5 * logits / 2
    assert whole == ROWS / 4 * SEQUENCE * WORDS / 2 * 4
