"""What communication hides behind what work. Nothing else is assumed to run at the same time."""

from __future__ import annotations


def exposed(communication: float, work: float, share: float) -> float:
    """Return the seconds of `communication` that stay visible beside `work`.

    `share` of the work can hide communication: gathering a layer's parameters runs beside the layer before,
    reducing its gradients beside the backward pass of the next one, sending to the next stage beside the
    microbatch after.
    """
    return max(0.0, communication - share * work)
