"""cuDNN's attention for GPUs that are not here.

XLA compiles calls of cuDNN without it, and leaves them in the program. JAX wants more: it asks the library
for its version when it traces a call, and devices when it lowers one, to partition what `jax.shard_map` has
partitioned already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jax._src import dispatch  # seen in 0.10.2 and 0.12.0
from jax._src.cudnn import fused_attention_stablehlo

# What a call becomes: plain, with a mask, and their gradients.
CUSTOM_CALLS = (
    "__cudnn$fmhaSoftmax",
    "__cudnn$fmhaSoftmaxBackward",
    "__cudnn$fmhaScaleBiasSoftmax",
    "__cudnn$fmhaScaleBiasSoftmaxBackward",
)

_PRIMITIVES = ("dot_product_attention", "custom_partitioning")

# cuDNN 9.12, the oldest that the CUDA 13 wheels of these versions of JAX take.
_OLDEST = 91200


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Within it JAX traces cuDNN's attention where the library is not there, for the oldest that it takes."""
    asked = fused_attention_stablehlo.check_cudnn_version

    def version() -> int:
        try:
            return asked()
        except RuntimeError:
            return _OLDEST

    fused_attention_stablehlo.check_cudnn_version = version
    try:
        yield
    finally:
        fused_attention_stablehlo.check_cudnn_version = asked


@contextlib.contextmanager
def described() -> Iterator[None]:
    """Within it JAX traces and lowers cuDNN's attention for a GPU that is not here, under `jax.shard_map`."""
    asked = fused_attention_stablehlo.check_cudnn_version
    needing = dispatch.prim_requires_devices_during_lowering
    spared = {one for one in needing if one.name.startswith(_PRIMITIVES)}
    fused_attention_stablehlo.check_cudnn_version = lambda: _OLDEST
    needing -= spared
    try:
        yield
    finally:
        fused_attention_stablehlo.check_cudnn_version = asked
        needing |= spared
