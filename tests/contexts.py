"""MLIR's contexts, which JAX 0.10 makes anew for each program: a fifth of the time that a small one takes.

JAX 0.11 and later give a thread's context to several programs by themselves.
"""

from __future__ import annotations

import threading
from typing import Any

# How many programs JAX 0.11 writes in one context, which keeps all types that it was asked for.
_USES = 10


class _Kept(threading.local):
    context: Any = None
    uses: int = 0


def share() -> None:
    """Have JAX write up to ten programs of a thread in one context, whichever its generation."""
    from jax._src.interpreters import mlir

    if hasattr(mlir, "_thread_local_context") or hasattr(mlir.make_ir_context, "plain"):
        return
    plain, kept = mlir.make_ir_context, _Kept()

    def shared() -> Any:
        if kept.context is None or kept.uses == _USES:
            kept.context, kept.uses = plain(), 0
        kept.uses += 1
        return kept.context

    shared.plain = plain  # type: ignore[attr-defined]
    mlir.make_ir_context = shared
