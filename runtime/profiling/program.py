"""The compiled program beside its trace: what names an operation's mesh axes and source line.

- ``<directory>/program/step.hlo.txt.gz``: the optimised program's text, `compiled.as_text()`
- ``<directory>/program/mesh.json``: its mesh: axes, and devices in mesh order
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...sharding.errors import UserError
from ...sharding.files import write_whole
from ...sharding.hlo.replica_groups import MeshAxes, axes_of_groups, axes_of_pairs
from ...sharding.hlo.text import HloModule, Instruction, parse_hlo

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

FOLDER = "program"
_TEXT = "step.hlo.txt.gz"
_MESH = "mesh.json"


@dataclass(frozen=True, kw_only=True)
class SavedProgram:
    """A program, the mesh it ran on, as axis name → size in mesh order, and the JAX that compiled it."""

    program: HloModule
    mesh: Mapping[str, int]
    jax: str = ""

    def axes(self, instruction: Instruction) -> MeshAxes:
        """Name the mesh axes that a collective instruction runs over.

        Raises:
            ValueError: `instruction` is not a collective, or names devices outside of the mesh.
        """
        if instruction.collective is None:
            raise ValueError(f"{instruction.name} is not a collective")
        groups = instruction.collective.groups
        if instruction.collective.kind == "collective_permute":
            return axes_of_pairs(groups, self.mesh)
        return axes_of_groups(groups, self.mesh)


def save_program(directory: str | Path, compiled: jax.stages.Compiled, mesh: Mesh) -> None:
    """Write what `read_profile` needs to attribute operations; process 0 writes for all.

    Args:
        directory: The profile folder, the same one as the `ProfileWindow`'s.
        compiled: The compiled step, ``jax.jit(step).lower(...).compile()``.
        mesh: The mesh whose device order the step was compiled for.

    Raises:
        UserError: The compiler gives no text for this program.
    """
    import jax

    if jax.process_index() != 0:
        return
    text = compiled.as_text()
    if not text:
        raise UserError("this program's compiler gives no text, so a profile of it cannot name mesh axes")
    folder = Path(directory) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "jax": jax.__version__,
        "axes": {str(name): int(size) for name, size in mesh.shape.items()},
        "devices": [_device(device) for device in mesh.devices.flat],
    }
    write_whole(folder / _TEXT, gzip.compress(text.encode(), compresslevel=3, mtime=0))
    write_whole(folder / _MESH, json.dumps(record, indent=1) + "\n")


def load_program(directory: str | Path) -> SavedProgram | None:
    """Read what `save_program` wrote, or None where nothing was saved.

    Raises:
        UserError: The files are damaged.
    """
    folder = Path(directory) / FOLDER
    if not (folder / _TEXT).exists() or not (folder / _MESH).exists():
        return None
    try:
        text = gzip.decompress((folder / _TEXT).read_bytes()).decode()
        record = json.loads((folder / _MESH).read_text())
        mesh = {str(axis): int(size) for axis, size in record["axes"].items()}
        return SavedProgram(program=parse_hlo(text), mesh=mesh, jax=str(record.get("jax", "")))
    except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"the saved program in {folder} is damaged: {error}; capture the profile again"
        ) from error


def _device(device: Any) -> dict[str, Any]:
    described = {
        "id": device.id,
        "process": device.process_index,
        "platform": device.platform,
        "kind": device.device_kind,
    }
    coordinates = getattr(device, "coords", None)
    return described | ({"coords": list(coordinates)} if coordinates is not None else {})
