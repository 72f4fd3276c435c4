"""A framework on a chip: what its kernels reach, and what it does otherwise than XLA."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Mapping
from pathlib import Path

from meshwright.sharding.cost.calibration import Calibration, calibration_for, checked, read_toml
from meshwright.sharding.hardware.chip import chips
from meshwright.sharding.ops.kernels import kernel_facts

SHIPPED = Path(__file__).with_name("calibration.toml")
_FACTS = Path(__file__).with_name("facts.toml")

# What of a framework no chip decides: the time of its host, what it overlaps, keeps and runs again.
_WAYS = (
    "kernel_seconds",
    "layer_seconds",
    "microbatch_seconds",
    "step_seconds",
    "fabric_seconds",
    "network_seconds",
    "overlap_parameters",
    "overlap_gradients",
    "overlap_shards",
    "overlap_activations",
    "overlap_stages",
    "imbalance_per_doubling",
    "fused_residuals",
    "reruns_layers",
    "accumulates_in_place",
    "loss_passes",
)

# Of these, what hosts give: the value whose move says that runs told it, and what is told with it. A fit
# trades the start of a kernel for the rest of a layer's time on the host: only one record's two say together
# how long a host takes for a layer.
_HOSTS = {
    "kernel_seconds": ("kernel_seconds", "layer_seconds"),
    "fabric_seconds": ("fabric_seconds",),
    "network_seconds": ("network_seconds",),
}
# By how much of itself a value has moved from where its fit began, if runs told it.
_MOVED = 0.1

# Chip → framework → record.
Tables = dict[str, dict[str, "Framework"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Framework(Calibration):
    """The efficiencies of a chip under a framework, and how that runs a step. The defaults are XLA's way.

    Attributes:
      fused_attention: whether scores stay on the chip.
      attention_share: of all scores, how many are computed (1/2: the hidden half is skipped).
      attention_gradient: the work of the kernel's backward pass over that of its forward pass.
      keeps_scores: whether scores that do not stay on the chip are kept for the backward pass, rather than
        run again.
      fused_residuals: whether what is saved is what fused kernels read rather than each operation.
      reruns_layers: whether all of a layer that is not kept is run again, needed or not.
      accumulates_in_place: whether a microbatch's gradients are added up where they are made; otherwise those
        of one and their sum lie in memory.
      balanced_stages: whether layers are dealt to stages so that the loss's products count as layers do,
        rather than evenly.
      loss_passes: how often a loss that is no single kernel goes over the logits for each time that one
        would.
      loss_copies: arrays as large as the logits that it holds at once, besides those it keeps.
      layer_seconds: host's time for a layer that no computing hides: where a framework waits for the device.
      fabric_group_exponent: of the group's share of its domain, in the efficiency of the fast links: small
        groups use few of them.
      library_ways: whether collectives go by the fastest of the communication library's ways, as the
        product's do; otherwise by rings, over which starts are fitted.
      pipelined_starts: how much longer exchanging activations takes to start while stages talk as well.
      copy_bytes: held for each parameter that a device computes with, besides the parameter, its gradient and
        the optimizer's arrays: buckets, flat copies.
      memory_overhead: bytes over those counted of what comes and goes within a step, as a share: what an
        allocator cannot use again.
      reserved_bytes: what the framework holds on each device besides.
    """

    fused_attention: bool = False
    attention_share: float = 1.0
    attention_gradient: float = 2.0
    keeps_scores: bool = True
    fused_residuals: bool = False
    reruns_layers: bool = False
    accumulates_in_place: bool = False
    balanced_stages: bool = False
    loss_passes: float = 1.0
    loss_copies: float = 1.0
    layer_seconds: float = 0.0
    fabric_group_exponent: float = 0.0
    library_ways: bool = False
    pipelined_starts: float = 1.0
    copy_bytes: float = 0.0
    memory_overhead: float = 0.0
    reserved_bytes: float = 0.0


def plain(chip: str) -> Framework:
    """Return the product's own efficiencies of a chip, as a record of a framework that nothing is known of.

    Attention is by the chip's kernel, as a plan has it, or by one like it where the chip has none.
    """
    known = chips().get(chip)
    kernel = None if known is None else known.attention_kernel
    return Framework(
        **dataclasses.asdict(calibration_for(chip, kernel)),
        fused_attention=True,
        attention_share=0.5,
        attention_gradient=2.5 if kernel is None else float(kernel_facts()[kernel]["gradient"]),
        library_ways=True,
    )


@functools.cache
def _families() -> dict[str, str]:
    rows = read_toml(_FACTS).values()
    rows = [*rows, *(row["replicated"] for row in rows if "replicated" in row)]
    return {row["calibration"]: row.get("family") or row["calibration"] for row in rows}


@functools.cache
def _balancing_stages() -> frozenset[str]:
    rows = read_toml(_FACTS).values()
    return frozenset(row["calibration"] for row in rows if row.get("balanced_stages"))


def family(framework: str) -> str:
    """Return what a record's framework has its code in common with, ``xla`` for those of JAX.

    >>> family("megatron-lm-selective"), family("paxml-fp8"), family("nobody-knows")
    ('megatron', 'xla', 'nobody-knows')
    """
    known, name = _families(), framework
    while name not in known and "-" in name:
        name = name.rpartition("-")[0]
    return known.get(name, framework)


def unseen(chip: str, framework: str, path: Path | None = None) -> Framework:
    """Return the record of a framework as if no run of it, nor of its family, had ever been measured.

    Kernels are the chip's own. XLA's ways are the product's; any other framework's are those in the middle of
    its nearest relatives: the other families on that chip, or on all chips where it has none. How long a host
    takes no chip decides, and most runs do not tell, since their devices are behind: it is in the middle of
    all relatives that were told it, whose records have moved from where every fit began. How layers are dealt
    to stages is no run's to tell: the framework's source says it.
    """
    own, mine = plain(chip), family(framework)
    if mine == "xla":
        return own
    begun, tables = _read(SHIPPED if path is None else path)
    kin = [
        (at, record)
        for at, rows in tables.items()
        for name, record in rows.items()
        if family(name) not in (mine, "xla") and "fp8" not in name
    ]
    near = [record for at, record in kin if at == chip] or [record for _, record in kin]
    if not near:
        return own
    # `median_low` is one of the values, as of what is either so or not it has to be.
    middle = {name: statistics.median_low([getattr(one, name) for one in near]) for name in _WAYS}
    for by, names in _HOSTS.items():
        before = getattr(begun, by)
        told = [one for _, one in kin if abs(getattr(one, by) - before) > _MOVED * before]
        if told:
            middle |= {name: statistics.median_low([getattr(one, name) for one in told]) for name in names}
    return dataclasses.replace(
        own, **middle, library_ways=False, balanced_stages=framework in _balancing_stages()
    )


def read(path: Path) -> tuple[Framework, Tables]:
    """Return ``[default]`` of a TOML file, and its records, ``[CHIP."FRAMEWORK"]``, which start from it."""
    tables = read_toml(path)
    base = tables.pop("default", {})
    return checked(Framework, base), {
        chip: {framework: checked(Framework, base | row) for framework, row in rows.items()}
        for chip, rows in tables.items()
    }


@functools.cache
def _read(path: Path) -> tuple[Framework, Tables]:
    return read(path)


def record_for(chip: str, framework: str, path: Path | None = None) -> Framework:
    """Return the record of `chip` under `framework`, or the nearest wider one.

    A variant (``torchtitan-fp8``) is its framework where the chip has no record of it; a framework that the
    chip has no record of is the chip's own.
    """
    rows = _read(SHIPPED if path is None else path)[1].get(chip, {})
    while framework not in rows and "-" in framework:
        framework = framework.rpartition("-")[0]
    return rows[framework] if framework in rows else plain(chip)


def write(path: Path, base: Framework, tables: Mapping[str, Mapping[str, Framework]]) -> None:
    """Write records as TOML: `base` as ``[default]``, of the others what differs from it.

    The comment at the top of a file that is there already stays.
    """
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = list(itertools.takewhile(lambda line: line.startswith("#"), before))
    rows = [("default", base)]
    for chip in sorted(tables):
        rows += [(f'{chip}."{name}"', row) for name, row in sorted(tables[chip].items())]
    for header, row in rows:
        lines += ["", f"[{header}]"]
        under = Framework() if row is base else base
        for field in dataclasses.fields(Framework):
            value = getattr(row, field.name)
            if value != getattr(under, field.name):
                text = str(value).lower() if isinstance(value, bool) else f"{value:.4g}"
                lines.append(f"{field.name} = {text}")
    path.write_text("\n".join(lines).lstrip() + "\n", encoding="utf-8")
