"""Arrays to and from a directory, by Orbax.

Orbax is imported on first use: it takes half a second, and a run that starts anew has nothing to read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from .spread import resharded, spread

# Several files are written and read at once; one of 256 MiB each reaches the disk's own speed.
_DATA_FILE_BYTES = 2**28
# What one device must read is a whole chunk: a larger one would be read again for each part of it.
_CHUNK_BYTES = 2**26


def prepare() -> None:
    """Import Orbax now, without its threads' own reports: `.result()` raises what fails in one."""
    from orbax.checkpoint import v1  # noqa: F401

    logging.getLogger("absl").addFilter(_is_told_once)


def _is_told_once(record: logging.LogRecord) -> bool:
    return "_SignalingThread.run() raised" not in str(record.msg)


def write(path: Path, tree: Any) -> Any:
    """Start writing a tree of `jax.Array`s and return Orbax's response; `.result()` waits for the disk.

    Returns when the arrays are in host memory. Every process of the job must call this. Not compressed:
    weights shrink by less than a tenth, and compressing them takes several times as long as the disk does.
    """
    prepare()
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    saving = context.array_options.saving
    saving.use_compression = False
    saving.ocdbt_target_data_file_size = _DATA_FILE_BYTES
    saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    with context:
        return ocp.save_async(str(path), tree)


def read(path: Path, abstract: dict[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """Read a nested dict of `jax.ShapeDtypeStruct`s with shardings, each part of an array once.

    An array that is to be replicated is read in parts, one for each device, and gathered over the devices'
    links. Every process reads for itself and waits for no other, so one that fails does not stop the rest;
    the caller compares notes before the gathering, which needs all of them: see `gather`. With `partial`,
    `abstract` need not name all that is there.
    """
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.pytree_options.loading.partial_load = partial
    if jax.process_count() > 1:
        context.multiprocessing_options.primary_host = jax.process_index()
        context.multiprocessing_options.active_processes = {jax.process_index()}
        context.multiprocessing_options.barrier_sync_key_prefix = f"read_by_{jax.process_index()}"
    parts = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread(leaf.sharding, leaf.shape)),
        abstract,
    )
    with context:
        return ocp.load(str(path), parts)


def gather(parts: list[jax.Array], targets: Sequence[Any]) -> list[jax.Array]:
    """Bring what `read` returned to the shardings of `targets`; every process of the job must call this."""
    return resharded(parts, [target.sharding for target in targets])
