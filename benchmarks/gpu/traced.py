"""A profile of a compiled step, whose kernels have names."""

from __future__ import annotations

import gzip
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

_STEPS = 2
# A command buffer's kernels all bear one name in a trace.
_TRACEABLE = {"xla_gpu_enable_command_buffer": ""}


def traced(
    lowered: Any, state: Any, operands: tuple[Any, ...], folder: pathlib.Path, options: Mapping[str, Any]
) -> None:
    """Keep a profile of two steps of `lowered`, which gives its donated `state` back first, in `folder`.

    The text of the program as compiled for it stands beside the profile in ``step.hlo.gz``.
    """
    on_gpu = jax.default_backend() == "gpu"
    compiled = lowered.compile(compiler_options={**options, **(_TRACEABLE if on_gpu else {})} or None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.hlo.gz").write_bytes(gzip.compress(compiled.as_text().encode()))
    *state, result = compiled(*state, *operands)
    jax.block_until_ready(result)
    with jax.profiler.trace(folder):
        for number in range(_STEPS):
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                *state, result = compiled(*state, *operands)
        jax.block_until_ready(result)
