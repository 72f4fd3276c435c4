"""Bytes of a device's memory that JAX lets a program have: by default, or as the environment says here.

JAX reserves a share of each GPU when it starts, three quarters unless told otherwise, and gives out no
more. The variables are those of the process that runs, which is taken to be this one unless GPUs of another
kind are attached to its machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..errors import UserError
from ..words import gib
from .attached import attached_accelerators, attached_nvidia
from .chip import Chip, chip_of_device_kind

#: The share of a GPU that JAX reserves; the second name is the older one, and JAX refuses both at once.
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
#: Whether it is taken at once; piece by piece it has the same end.
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
#: What hands memory out; the driver's own (``platform``) reserves nothing and ends at the device's.
ALLOCATOR = "XLA_PYTHON_CLIENT_ALLOCATOR"


def usable_bytes(chip: Chip) -> float:
    """Return the bytes of a device's memory that a program may have; infinite where that is not known.

    Of a GPU as the environment says, be it attached or described; by default of one that is described while
    GPUs of another kind are attached, whose share the environment's is.

    Raises:
        UserError: the environment asks for a share that JAX refuses.
    """
    if chip.hbm_bytes is None or not _is_meant(chip):
        return chip.usable_bytes
    return chip.hbm_bytes * share_here(chip.memory_share)


def notes_on(chip: Chip) -> tuple[str, ...]:
    """Say where this process's share of memory stands for that of GPUs elsewhere, or does not."""
    said = [name for name in (*FRACTIONS, ALLOCATOR) if os.environ.get(name)]
    if not said or chip.platform != "gpu" or chip.hbm_bytes is None or _is_attached(chip):
        return ()
    names = " and ".join(f"{name}={os.environ[name]}" for name in said)
    if _is_meant(chip):
        return (
            f"the plan counts on {gib(usable_bytes(chip))} of each {chip.name}'s {gib(chip.hbm_bytes)}, by "
            f"{names} of this process: it has to be set where it trains, too",
        )
    return (
        f"{names} is of this process, whose machine has no {chip.name}: the plan counts on the "
        f"{chip.memory_share:.0%} of their memory that JAX reserves by default",
    )


def share_here(usual: float, environment: Mapping[str, str] | None = None) -> float:
    """Return the share of a GPU's memory that an environment has JAX let programs have, by default `usual`.

    >>> share_here(0.75, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".9", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    0.9
    >>> share_here(0.75, {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"})
    1.0

    Raises:
        UserError: the environment asks for a share that JAX refuses.
    """
    words = os.environ if environment is None else environment
    given = {name: words[name] for name in FRACTIONS if words.get(name)}
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are both set, which JAX refuses; unset {FRACTIONS[1]}")
    if words.get(ALLOCATOR, "").lower() == "platform":
        return 1.0
    for name, value in given.items():
        try:
            share = float(value)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise UserError(f"{name}={value} is no share of a device's memory; nearest: 0.75, JAX's default")
        return share
    return usual


def _is_meant(chip: Chip) -> bool:
    """Whether the environment's share can be of such devices: unless GPUs of another kind are attached."""
    return chip.platform == "gpu" and (_is_attached(chip) or not _attached())


def _is_attached(chip: Chip) -> bool:
    """Whether devices of this kind are attached, as far as the operating system tells their kind."""
    if chip.platform != "gpu" or not _attached():
        return False
    models = attached_nvidia()
    return not models or any(chip_of_device_kind(model, "gpu").name == chip.name for model in models)


def _attached() -> bool:
    """Whether any GPU is attached."""
    return bool({"gpu", "rocm"} & set(attached_accelerators()))
