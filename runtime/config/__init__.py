"""Settings of a run, read from YAML and checked before JAX is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...sharding.errors import door

if TYPE_CHECKING:
    from .config import Config as Config
    from .config import MetricsConfig as MetricsConfig
    from .config import ModelConfig as ModelConfig
    from .config import TrainConfig as TrainConfig
    from .config import dump as dump
    from .config import fields as fields
    from .config import load as load
    from .config import parse as parse
    from .describe import describe_presets as describe_presets
    from .describe import describe_settings as describe_settings
    from .hosts import HostsConfig as HostsConfig
    from .optimizer import OptimizerConfig as OptimizerConfig

# Name → module that defines it, loaded on first use.
_HOMES = {
    "Config": "config",
    "HostsConfig": "hosts",
    "MetricsConfig": "config",
    "ModelConfig": "config",
    "OptimizerConfig": "optimizer",
    "TrainConfig": "config",
    "describe_presets": "describe",
    "describe_settings": "describe",
    "dump": "config",
    "fields": "config",
    "load": "config",
    "parse": "config",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = door(__name__, _HOMES)
