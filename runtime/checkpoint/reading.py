"""From a committed checkpoint to arrays, checked leaf by leaf."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ...sharding.errors import UserError, nearest
from ...sharding.words import first_of
from . import manifest, store
from .errors import Damaged, first_line
from .fingerprint import fingerprints
from .leaves import leaf_names, nbytes, nest, pick
from .manifest import Manifest

_BATCH_BYTES = 2**30


def read_parts(
    directory: Path, abstract_state: Any
) -> tuple[Manifest | None, list[jax.Array] | None, str | None]:
    """Read a checkpoint's arrays in parts; returns (manifest, leaves, None) or (…, None, what is wrong).

    A fault is returned rather than raised, as the other processes of the job must hear of it first. Raises
    `UserError`, in all of them alike, when `abstract_state` is not what was saved.
    """
    try:
        record = manifest.read(directory)
    except Damaged as damage:
        return None, None, str(damage)
    check_structure(record, abstract_state)
    names = leaf_names(abstract_state)
    try:
        nested = store.read(directory, nest(names, jax.tree.leaves(abstract_state)))
    except (ValueError, KeyError, OSError) as error:
        return record, None, f"reading its arrays failed: {first_line(error)}"
    return record, pick(nested, names), None


def verify_arrays(directory: Path, record: Manifest) -> str | None:
    """Read every array onto one device, a gibibyte at a time; returns what is wrong, naming the leaf."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    for batch in _batches(record.leaves):
        names = [leaf.name for leaf in batch]
        abstract = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for leaf in batch]
        try:
            leaves = pick(store.read(directory, nest(names, abstract), partial=True), names)
        except (ValueError, KeyError, OSError) as error:
            return f"reading leaf {first_of(names)} failed: {first_line(error)}"
        fault = check_leaves(record, names, leaves)
        if fault is not None:
            return fault
    return None


def _batches(leaves: Sequence[manifest.SavedArray]) -> list[list[manifest.SavedArray]]:
    batches: list[list[manifest.SavedArray]] = []
    room = 0
    for leaf in leaves:
        size = nbytes([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)])
        if not batches or size > room:
            batches.append([])
            room = _BATCH_BYTES
        batches[-1].append(leaf)
        room -= size
    return batches


def check_structure(record: Manifest, abstract_state: Any) -> None:
    """Raise `UserError` naming the first leaf that only one of the two has or that is of another shape."""
    wanted = dict(zip(leaf_names(abstract_state), jax.tree.leaves(abstract_state), strict=True))
    saved = {leaf.name: leaf for leaf in record.leaves}
    for name in wanted:
        if name not in saved:
            raise UserError(
                f"the checkpoint at step {record.step} has no leaf {name}; {nearest(name, saved)}"
            )
    for name, leaf in saved.items():
        if name not in wanted:
            raise UserError(
                f"the checkpoint at step {record.step} has a leaf {name} that this run has not; "
                f"{nearest(name, wanted)}"
            )
        here = wanted[name]
        if tuple(here.shape) != leaf.shape or str(here.dtype) != leaf.dtype:
            raise UserError(
                f"leaf {name} is {leaf.dtype}{list(leaf.shape)} in the checkpoint at step {record.step} "
                f"and {here.dtype}{list(here.shape)} in this run"
            )


def check_leaves(record: Manifest, names: Sequence[str], leaves: Sequence[jax.Array]) -> str | None:
    """Compare the leaves' fingerprints with those saved; returns what is wrong, naming the leaves."""
    saved = {leaf.name: leaf.fingerprint for leaf in record.leaves}
    found = fingerprints(leaves).hex()
    wrong = [name for name, now in zip(names, found, strict=True) if saved[name] != now]
    if not wrong:
        return None
    return f"leaf {first_of(wrong)} is not what was saved: the fingerprint does not fit"
