"""What is said where an axis has no dimension of the parameters to cut."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from meshwright.sharding import UserError, plan


def test_dimensions_that_are_no_use_are_not_said_to_divide_badly() -> None:
    def loss(params: Any, batch: Any) -> Any:
        left, right = (batch[name] @ params[name] for name in "ab")
        return jax.nn.softplus(left @ right.T).mean()

    params = {name: jax.ShapeDtypeStruct((16, 32), "float32") for name in "ab"}
    batch = {name: jax.ShapeDtypeStruct((16, 16), "float32") for name in "ab"}
    with pytest.raises(UserError, match=r"tensor=2 .* two activations are multiplied along it; rules="):
        plan(loss, params, batch, topology="cpu:8", mesh={"tensor": 2})
