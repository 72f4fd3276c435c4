"""Which accelerators this machine shows, and quiet from the plugins of those that it has not.

JAX starts every plugin that is installed, in every process. On a machine that only compiles, the CUDA plugin
finds no cuDNN and logs a traceback, and libtpu complains that nobody told it which machine of a slice it is
on, though nothing is wrong: only a device needs these.
"""

from __future__ import annotations

import os
import pathlib

_ROOT = pathlib.Path("/")

# What the operating system shows of an accelerator, by kind. /dev/dxg is a GPU under WSL, nvhost and nvmap
# are Tegra's; newer TPUs are handed through as numbered VFIO groups, as other PCI devices may be.
_TEGRA = ("dev/nvhost-*", "dev/nvmap")
_NVIDIA = ("proc/driver/nvidia/gpus/*", "dev/nvidia[0-9]*", "dev/nvidiactl", "dev/dxg", *_TEGRA)
_SIGNS = {"gpu": _NVIDIA, "tpu": ("dev/accel*", "dev/vfio/[0-9]*"), "rocm": ("dev/kfd",)}

# What spares a process the plugin of an absent device, by kind: variables that are read when JAX first looks
# for devices. The CUDA plugin then does not check its libraries. libtpu asks nobody where it is, leaves no
# log file, and is loaded by several processes at once; else each is taken for the one that drives the chips.
_QUIET = {
    "gpu": {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
    "tpu": {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    },
}


def attached_accelerators() -> tuple[str, ...]:
    """Return the kinds of accelerators (``gpu``, ``tpu``, ``rocm``) that the operating system shows."""
    return tuple(kind for kind, signs in _SIGNS.items() if any(any(_ROOT.glob(sign)) for sign in signs))


def quiet_absent() -> None:
    """Keep the plugins of absent accelerators quiet; variables that are set stay as they are.

    Where there is such an accelerator nothing is set for it: there what the plugin says is of use.
    """
    attached = attached_accelerators()
    for kind, variables in _QUIET.items():
        for name, value in variables.items() if kind not in attached else ():
            os.environ.setdefault(name, value)
