"""A config's plan tried in small: its model, reduced, on simulated devices, against the plain function."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from subprocess import TimeoutExpired
from typing import Any

from ...sharding.errors import UserError
from ...sharding.hardware.topology import Topology
from ...sharding.plans import file
from ...sharding.plans.record import Record
from ...sharding.plans.reduced import Reduction, reduction_of
from ...sharding.processes import fate, run
from ...sharding.report.deviation import deviation_document
from ...sharding.report.document import Document
from ...sharding.report.plan import layout_of
from ...sharding.transform.deviation import Deviation
from ...sharding.verify.verify import environment
from ..config import Config
from ..errors import RunError

_SECONDS = 900.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanCheck:
    """What trying a plan in small came to.

    Attributes:
        reduction: the mesh, microbatches and rows that it was tried with.
        model: parts of the model → their sizes, as tried.
        types: type of its products → how far the planned loss was from the plain function.
    """

    reduction: Reduction
    model: Mapping[str, int]
    types: Mapping[str, Deviation]

    @property
    def passes(self) -> bool:
        """Whether rounding explains every difference."""
        return all(one.passes for one in self.types.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the check as plain values; the loss stands at ``loss`` among the gradients' paths."""
        return {
            "passes": self.passes,
            "reduction": dataclasses.asdict(self.reduction),
            "model": dict(self.model),
            "types": {name: _plain(one) for name, one in self.types.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlanCheck:
        """Return the check that `to_dict` wrote."""
        return cls(
            reduction=Reduction(**values["reduction"]),
            model=values["model"],
            types={
                name: Deviation(
                    **{key: one[key] for key in ("loss", "expected", "own")},
                    routed=None if one["routed"] is None else tuple(one["routed"]),
                    apart={_path(path): row[0] for path, row in one["apart"].items()},
                    allowed={_path(path): row[1] for path, row in one["apart"].items()},
                )
                for name, one in values["types"].items()
            },
        )


def _plain(one: Deviation) -> dict[str, Any]:
    rows = {"loss" if path is None else path: [one.apart[path], one.allowed[path]] for path in one.worst}
    values = {name: getattr(one, name) for name in ("passes", "loss", "expected", "own", "routed")}
    return {**values, "apart": rows}


def _path(written: str) -> str | None:
    return None if written == "loss" else written


def check_document(plan: Record, check: PlanCheck) -> Document:
    """Return what `meshwright plan CONFIG --check` prints."""
    how = check.reduction
    mesh = {axis: size for axis, size in how.mesh.items() if size > 1}
    sizes = ", ".join(f"{name} {size:,}" for name, size in check.model.items())
    parts_of = f" in {how.microbatches} parts" if how.microbatches > 1 else ""
    parts = [f"cpu:{how.devices}", " x ".join(f"{axis}={size}" for axis, size in mesh.items())]
    parts += [f"{how.rows} rows{parts_of}", *([sizes] if sizes else ())]
    chunks = [f"{how.interleave} chunks a stage"] if how.interleave > 1 else []
    return deviation_document(check.types, of=layout_of(plan), tried="; ".join(filter(None, parts + chunks)))


def check_plan(config: Config, plan: Record) -> PlanCheck:
    """Run a config's model in small, as planned and plainly, in a process with simulated devices.

    This process may have started JAX, on whatever devices. Raises UserError where the model cannot be made
    small or the plan does not go with it, RunError where the process ends.
    """
    devices = reduction_of(plan).devices
    with tempfile.TemporaryDirectory(prefix="meshwright-") as name:
        folder = pathlib.Path(name)
        file.write(plan, folder / "plan.json")
        request = {"config": config.model_dump(mode="json", exclude_unset=True), "devices": devices}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", f"{__package__}.check_worker", name]
        try:
            ended = run(command, timeout_seconds=_SECONDS, env=_environment(devices))
        except TimeoutExpired:
            raise RunError(f"the check took longer than {_SECONDS:g} s") from None
        try:
            answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            said = " | ".join(line for line in ended.stderr.splitlines()[-4:] if line.strip())
            raise RunError(f"the process of the check {fate(ended.returncode)}: {said}") from None
    if "refused" in answer:
        raise UserError(answer["refused"])
    return PlanCheck.from_dict(answer)


def _environment(devices: int) -> dict[str, str]:
    # Values alone are looked at, which XLA's optimisations leave as they are, and take half of the time.
    fast = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return {**os.environ, **environment(Topology.parse(f"cpu:{devices}")), **fast}
