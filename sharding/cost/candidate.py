"""One way of running a program, as the search proposes it and the cost model prices it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from ..errors import UserError
from ..ops.context.ways import check_way
from ..plans.vocabulary import ONE_BY_ONE, check_words

# The mesh axes of each dimension of an array, major first.
Storage = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A mesh and how a program lies on it.

    Attributes:
      mesh: axis → size; axes of size 1 may be left out.
      dims: dim id of the Program → the mesh axes that shard it while computing. Where two dims of one array
        want the same axis, one that parameters have goes first: heads and sequence both over ``tensor`` is
        sequence parallelism. A dim of the layers that maps to ``stage`` is cut into pipeline stages.
      stored: index of a parameter argument → per array dimension the mesh axes it is stored over. More axes
        than `dims` gives mean that it is gathered at use (FSDP, ZeRO-3). A parameter that is not listed is
        stored as it is computed with.
      optimizer: the same for the optimizer's moments; more axes than `stored` is ZeRO-1. Default: `stored`.
      gradients: the same for the accumulated gradients; more axes than `stored` is ZeRO-2. Default:
        `stored`.
      remat: ``none``, ``dots``, ``full`` or ``names``, as in `meshwright.sharding.transform.remat`.
      saved: under ``names``, the values of layers that are kept → ``device`` or ``host``.
      microbatches: how many the batch is worked through in, one after another.
      schedule: of pipeline stages, a word of `vocabulary.SCHEDULES`.
      interleave: model chunks that a stage holds.
      stage_remat: whether a stage runs its chunks again from their inputs, as in `plans.record.Decision`.
      rows: of a pipeline, the rows of the batch that a device has; 0 where stages share out as many as there
        are of them.
      context: how attention goes over ``context``, a word of `ops.context.ways.WAYS`; None where XLA gathers.

    Raises:
      UserError: an axis, a policy or a schedule is not known, or a count is below 1.
    """

    mesh: Mapping[str, int]
    dims: Mapping[int, tuple[str, ...]]
    stored: Mapping[int, Storage] = dataclasses.field(default_factory=dict)
    optimizer: Mapping[int, Storage] = dataclasses.field(default_factory=dict)
    gradients: Mapping[int, Storage] = dataclasses.field(default_factory=dict)
    remat: str = "none"
    saved: Mapping[str, str] = dataclasses.field(default_factory=dict)
    microbatches: int = 1
    schedule: str = ONE_BY_ONE
    interleave: int = 1
    stage_remat: bool = True
    rows: int = 0
    context: str | None = None

    def __post_init__(self) -> None:
        check_words(self.mesh, self.remat, self.schedule)
        check_way(self.context)
        if self.microbatches < 1 or self.interleave < 1:
            raise UserError(
                f"microbatches={self.microbatches} and interleave={self.interleave} must be at least 1"
            )

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh.values())
