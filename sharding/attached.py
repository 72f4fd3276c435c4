"""Which accelerators this machine shows, and quiet from the plugins of those that it has not.

JAX starts every plugin that is installed. On a machine that only compiles, the CUDA plugin finds no cuDNN and
logs a traceback in each process, though nothing is wrong: it checks libraries that only a GPU needs.
"""

from __future__ import annotations

import os
import pathlib

# What the operating system shows of an accelerator, by kind. /dev/dxg is a GPU under WSL, nvhost and nvmap
# are Tegra's; newer TPUs are handed through as numbered VFIO groups, as other PCI devices may be.
_TEGRA = ("dev/nvhost-*", "dev/nvmap")
_NVIDIA = ("proc/driver/nvidia/gpus/*", "dev/nvidia[0-9]*", "dev/nvidiactl", "dev/dxg", *_TEGRA)
_SIGNS = {"gpu": _NVIDIA, "tpu": ("dev/accel*", "dev/vfio/[0-9]*"), "rocm": ("dev/kfd",)}


def attached_accelerators() -> tuple[str, ...]:
    """Return the kinds of accelerators (``gpu``, ``tpu``, ``rocm``) that the operating system shows."""
    root = pathlib.Path("/")
    return tuple(kind for kind, signs in _SIGNS.items() if any(any(root.glob(sign)) for sign in signs))


def quiet_absent_gpu() -> None:
    """Spare a machine without an NVIDIA GPU the CUDA plugin's check of its libraries.

    JAX reads the variable when it first looks for devices. With a GPU nothing is set: there the check is of
    use.
    """
    if "gpu" not in attached_accelerators():
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def quiet_absent_tpu() -> None:
    """Keep libtpu, in a process that only compiles, from looking for the TPU that it would drive.

    Call before libtpu is loaded. Without the first variable one process at a time can load it: it takes each
    for the one that drives the chips. The others stop it from asking the network which machine of a slice it
    is on, from saying that nobody told it, and from leaving a log file; where there is a TPU they are unset.
    """
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if "tpu" in attached_accelerators():
        return
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_PROCESS_BOUNDS", "1,1,1")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
