"""The checkpoints of one run: save in the background, restore the newest that is whole."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax

from ...sharding.errors import UserError, nearest
from ...sharding.files import FolderInUse, FolderLock
from ...sharding.transform.step import has_stopped, lasting, resumed
from . import fingerprint, folder, manifest, spread, store
from .agreement import first_fault, from_first
from .errors import CheckpointError, Damaged, first_line
from .leaves import abstract, check_arrays, keys_again, keys_as_numbers, leaf_names, nest
from .reading import check_leaves, read_parts
from .retention import Retention, expendable
from .writing import finish

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint that was read and found whole."""

    step: int
    state: Any
    metadata: Mapping[str, Any]
    metrics: Mapping[str, float]


class Checkpoints:
    """The checkpoints in `directory`, for the one run that writes them.

    >>> with Checkpoints("run/checkpoints", keep_last=3) as checkpoints:  # doctest: +SKIP
    ...     restored = checkpoints.restore(abstract_state)
    ...     checkpoints.save(step, state, metadata={"seed": 0})

    In a job of several processes all of them make this object and call its methods alike; the folder must be
    one that all of them see.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int | None = 3,
        keep_every: int | None = None,
        keep_best: str | None = None,
        best_mode: Literal["min", "max"] = "min",
    ) -> None:
        """Open or make `directory`, and remove what a killed run left half written.

        Which checkpoints stay is told by `Retention`. Raises `UserError` when another run has the folder.
        """
        self.directory = Path(directory).absolute()
        self.retention = Retention(
            keep_last=keep_last, keep_every=keep_every, keep_best=keep_best, best_mode=best_mode
        )
        self._saving: _Saving | None = None
        self._snapshots = spread.Snapshots()
        self._written: set[int] = set()
        self._lock: FolderLock | None = None
        if jax.process_index() == 0:
            self._lock = _opened(self.directory)
            for name in folder.remove_unfinished(self.directory):
                _log.info("removed %s, left unfinished by a run that was stopped", self.directory / name)

    def steps(self) -> list[int]:
        """Return the steps that have a committed checkpoint, oldest first."""
        return folder.committed_steps(self.directory)

    def prepare(self, abstract_state: Any) -> None:
        """Import Orbax and compile what a save runs, so that the first save takes no longer than the rest.

        `abstract_state` is as for `restore`. Best called while the devices are busy with the first step.
        """
        leaves = [abstract(leaf) for leaf in jax.tree.leaves(keys_as_numbers(lasting(abstract_state)))]
        fingerprint.prepare(spread.prepare(leaves))
        store.prepare()

    def save(
        self,
        step: int,
        state: Any,
        *,
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> float:
        """Save `state` and JSON `metadata`; returns the seconds that the caller was held.

        Returns when the state is in host memory, and writes it in the background: the next step may donate
        the state's buffers. While another save is being written, waits for it and says so. A step that this
        object has saved or restored already is not saved again. Raises `UserError` for leaves that are not
        `jax.Array`s and `CheckpointError` when the save before this one could not be written, or for a
        training state that has stopped: it is not of `step`, whose loss or gradients were not finite.
        """
        begun = time.monotonic()
        check_arrays(state)
        if has_stopped(state):
            raise CheckpointError(
                f"the state is not saved at step {step}: a loss or gradient was not finite, and it has "
                f"stopped after {int(state['step'])} steps"
            )
        state = keys_as_numbers(lasting(state))
        record = _plain(metadata)
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        if self._saving is not None and self._saving.thread.is_alive():
            previous = self._saving.step
            self.wait()
            if previous != step:
                waited = time.monotonic() - begun
                _log.warning("the save at step %d waited %.1f s for that at step %d", step, waited, previous)
        self.wait()
        if step in self._written:
            _log.info("step %d is saved already", step)
            return time.monotonic() - begun
        self._make_room(step)
        names = leaf_names(state)
        copies = self._snapshots.take(jax.tree.leaves(state))
        try:
            response = store.write(folder.writing_path(self.directory, step), nest(names, copies))
            # Not before: they would take turns with the copying that the caller waits for.
            started = fingerprint.fingerprints(copies)
        except Exception as error:
            raise _failed(self.directory, step, error) from error
        described = [
            (name, tuple(leaf.shape), str(leaf.dtype)) for name, leaf in zip(names, copies, strict=True)
        ]

        def in_background() -> None:
            finish(self.directory, step, response, started, described, record, numbers)
            self._snapshots.give_back(copies)
            self._written.add(step)
            self._delete_expendable()

        self._saving = _Saving(step, in_background)
        return time.monotonic() - begun

    def _delete_expendable(self) -> None:
        if jax.process_index() == 0:
            for old in expendable(self.retention, self._known_metrics()):
                folder.delete(self.directory, old)

    def check(self) -> None:
        """Raise `CheckpointError` now if a save has failed in the background; never waits."""
        if self._saving is not None and not self._saving.thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until the save that is being written is on the disk; raises `CheckpointError` if it failed."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        saving.thread.join()
        if saving.error is not None:
            raise _failed(self.directory, saving.step, saving.error) from saving.error

    def close(self) -> None:
        """Wait for the save that is being written, and let others use the folder."""
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            # The error that is on its way out is the one to see; this one may follow from it.
            _log.error("%s", failure)

    def restore(self, abstract_state: Any, *, step: int | None = None) -> Restored | None:
        """Read the newest checkpoint that is whole onto the shardings of `abstract_state`.

        `abstract_state` is a tree of `jax.ShapeDtypeStruct`s with shardings, of the structure that was saved
        but on any mesh. A training state's ``stopped`` is not saved, and comes back as False. A checkpoint
        that is not what was saved is moved to ``damaged/`` with a warning that names the leaf or the file,
        and the one before it is read; `step` asks for one and no other.

        Returns None when there is no checkpoint. Raises `CheckpointError` when there were some and none is
        whole, and `UserError` when the state is of another shape than the one saved.
        """
        self.wait()
        whole, wanted = abstract_state, lasting(abstract_state)
        abstract_state = keys_as_numbers(wanted)
        faults: list[str] = []
        while True:
            chosen = from_first(self._newest_whole(step, faults) if jax.process_index() == 0 else -1)
            if chosen < 0:
                return self._none_left(step, faults)
            directory = self.directory / str(chosen)
            record, parts, fault = read_parts(directory, abstract_state)
            fault = first_fault(fault)
            if fault is None and record is not None and parts is not None:
                fault = first_fault(check_leaves(record, leaf_names(abstract_state), parts))
                if fault is None:
                    leaves = store.gather(parts, jax.tree.leaves(abstract_state))
                    leaves = keys_again(leaves, jax.tree.leaves(wanted))
                    self._written.add(chosen)
                    state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
                    return Restored(
                        step=chosen,
                        state=resumed(state, whole),
                        metadata=record.metadata,
                        metrics=record.metrics,
                    )
            self._set_aside(chosen, str(fault), faults)

    def _newest_whole(self, step: int | None, faults: list[str]) -> int:
        """Return the newest step (or `step`) whose manifest and files are in order, -1 if there is none."""
        for candidate in reversed(self.steps()):
            if step is not None and candidate != step:
                continue
            try:
                directory = self.directory / str(candidate)
                manifest.check_files(directory, manifest.read(directory))
                return candidate
            except Damaged as damage:
                self._set_aside(candidate, str(damage), faults)
        return -1

    def _set_aside(self, step: int, fault: str, faults: list[str]) -> None:
        faults.append(f"step {step}: {fault}")
        if jax.process_index() == 0:
            moved = folder.set_aside(self.directory, step, "damaged")
            _log.warning("checkpoint at step %d is damaged: %s; moved to %s", step, fault, moved)

    def _none_left(self, step: int | None, faults: list[str]) -> None:
        if step is not None and not faults:
            known = nearest(str(step), map(str, self.steps()))
            raise UserError(f"there is no checkpoint at step {step} in {self.directory}; {known}")
        damaged = folder.damaged_names(self.directory)
        if faults or damaged:
            told = "; ".join(faults) or f"set aside earlier: {', '.join(damaged)}"
            raise CheckpointError(
                f"no checkpoint in {self.directory} is whole ({told}); "
                f"to start anew, remove {self.directory / 'damaged'}"
            )

    def _make_room(self, step: int) -> None:
        """Move checkpoints of a time line that was left, by resuming from an older step, out of the way."""
        if jax.process_index() != 0:
            return
        for newer in [old for old in self.steps() if old >= step]:
            moved = folder.set_aside(self.directory, newer, "superseded")
            _log.warning("checkpoint at step %d is superseded by step %d; moved to %s", newer, step, moved)

    def _known_metrics(self) -> dict[int, Mapping[str, float]]:
        known: dict[int, Mapping[str, float]] = {}
        for step in self.steps():
            try:
                known[step] = manifest.read(self.directory / str(step)).metrics
            except Damaged as damage:
                # Restoring sets it aside, with its data; deleting is for checkpoints known to be spare.
                _log.warning("checkpoint at step %d is damaged: %s", step, damage)
        return known


class _Saving:
    """A save on its way to the disk: its step, its thread and, at the end, its error."""

    def __init__(self, step: int, work: Callable[[], None]) -> None:
        self.step = step
        self.error: BaseException | None = None
        self._work = work
        # A daemon, so that a process that is told to exit does not wait for a disk that hangs.
        self.thread = threading.Thread(target=self._run, name=f"checkpoint-{step}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
        finally:
            # The work holds the copy of the state.
            del self._work


def _opened(directory: Path) -> FolderLock:
    """Make the folder of a run's checkpoints where there is none, and take it for this process."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return FolderLock(directory)
    except FolderInUse as held:
        raise UserError(
            f"checkpoints in {directory} are in use by {held.owner}; wait for it or stop it"
        ) from None
    except OSError as error:
        raise UserError(f"checkpoints cannot be kept in {directory}: {error.strerror}") from None


def _failed(directory: Path, step: int, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint at step {step} could not be written to {directory}: {first_line(error)}"
    )


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that later changes by the caller do not reach; refuses what JSON cannot hold."""
    try:
        return json.loads(json.dumps(dict(metadata)))
    except (TypeError, ValueError) as error:
        raise UserError(f"the metadata of a checkpoint must be JSON: {error}") from None
