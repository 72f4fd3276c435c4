"""Flax NNX as it is installed, or one sentence on why it does not load beside this JAX."""

from __future__ import annotations

from .flax_versions import FlaxDoesNotLoad, why_not

try:
    from flax import nnx as nnx
except (ImportError, AttributeError) as error:
    raise FlaxDoesNotLoad(why_not(error)) from error
