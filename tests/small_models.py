"""Models that a config names by `model.build`, small enough to compile in a second."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import mlir
from meshwright.models import Model, mlp
from meshwright.models.perceptron import MlpConfig


def perceptron(embed: int = 16, hidden: int = 32) -> Model:
    """A perceptron over bytes."""
    return mlp(MlpConfig(vocab=264, embed=embed, mlp=hidden))


def of_one_size(embed: int = 16, hidden: int = 32) -> Model:
    """A perceptron whose loss takes its own sizes alone."""
    model = perceptron(embed, hidden)

    def loss(params: Any, batch: Any) -> Any:
        assert params["up"].shape == (embed, hidden)
        assert params["table"].shape[0] == 264
        return model.loss(params, batch)

    return dataclasses.replace(model, loss=loss)


# A primitive that nobody has told meshwright of: it gives its operand.
MYSTERY = core.Primitive("mystery")
MYSTERY.def_abstract_eval(lambda x: x)
mlir.register_lowering(MYSTERY, mlir.lower_fun(lambda x: x, multiple_results=False))


def mysterious() -> Model:
    """A perceptron whose loss has a primitive without a rule in it, which changes nothing."""
    model = perceptron()

    def loss(params: Any, batch: Any) -> Any:
        value, aux = model.loss(params, batch)
        return value + 0 * MYSTERY.bind(jax.lax.stop_gradient(value)), aux

    return dataclasses.replace(model, loss=loss)


def changing() -> Model:
    """A perceptron trained with dropout on its matrix, and judged by a moving average of its parameters."""
    model = perceptron()

    def init(key: Any) -> Any:
        params = model.init(key)
        return params, {"average": params, "draws": jax.random.key(4), "count": jax.numpy.int32(0)}

    def loss(params: Any, batch: Any, state: Any) -> Any:
        draws, now = jax.random.split(state["draws"])
        kept = jax.random.bernoulli(now, 0.8, params["up"].shape)
        value, aux = model.loss({**params, "up": params["up"] * kept}, batch)
        average = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, state["average"], params)
        return value, (aux, {"average": average, "draws": draws, "count": state["count"] + 1})

    return dataclasses.replace(
        model,
        init=init,
        loss=loss,
        has_state=True,
        evaluation=lambda params, batch, state: model.loss(state["average"], batch),
    )
