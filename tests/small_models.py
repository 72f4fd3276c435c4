"""Models that a config names by `model.build`, small enough to compile in a second."""

from __future__ import annotations

from meshwright.models import Model, mlp
from meshwright.models.perceptron import MlpConfig


def perceptron(embed: int = 16, hidden: int = 32) -> Model:
    """A perceptron over bytes."""
    return mlp(MlpConfig(vocab=264, embed=embed, mlp=hidden))
