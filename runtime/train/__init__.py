"""Training: from a config to a plan, a step, a loop and a run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...sharding.errors import door

if TYPE_CHECKING:
    from .job import Job as Job
    from .job import build_job as build_job
    from .model import build_model as build_model
    from .planning import plan_config as plan_config
    from .run import train as train

# Name → module that defines it, loaded on first use.
_HOMES = {
    "Job": "job",
    "build_job": "job",
    "build_model": "model",
    "plan_config": "planning",
    "train": "run",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = door(__name__, _HOMES)
