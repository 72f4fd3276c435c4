"""One row of the measured runs as a program, a topology and a candidate."""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshwright.sharding import Topology
from meshwright.sharding.chips import chip_named
from meshwright.sharding.cost import Candidate
from meshwright.sharding.errors import UserError
from meshwright.sharding.topology_text import read as read_topology

_HERE = Path(__file__).parent


class NotExpressible(Exception):
    """A row that this library's programs or candidates cannot say; its text is the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a decoder is built from; `gated` is whether its MLP has a gate."""

    layers: int
    embed: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    sequence: int
    batch: int
    head_dim: int
    gated: bool
    tied: bool

    @property
    def weights(self) -> float:
        """Numbers that every token is multiplied with: projections, MLP and the output."""
        attention = 2 * self.embed * self.head_dim * (self.heads + self.kv_heads)
        mlp = (3 if self.gated else 2) * self.embed * self.mlp
        return self.layers * (attention + mlp) + self.embed * self.vocab

    @property
    def step_flops(self) -> float:
        """Operations of one step, forward and backward, counting all of attention and nothing twice."""
        scores = 2 * self.layers * self.heads * self.head_dim * self.sequence
        return 6.0 * (self.weights + scores) * self.batch * self.sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A measured row: `seconds` is None where the run did not complete; `peak_bytes` None where not said."""

    source: str
    cell: tuple[str, ...]
    label: str
    architecture: Architecture
    topology: Topology
    layout: Mapping[str, Any]
    framework: Mapping[str, Any]
    dtype: str
    seconds: float | None
    peak_bytes: float | None


def load(path: Path) -> tuple[list[Run], list[tuple[str, str, str]]]:
    """Return the rows of a CSV, and (source, label, reason) of those that cannot be expressed."""
    runs, left = [], []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                runs.append(parse(row))
            except NotExpressible as error:
                left.append((row["source"], _label(row), str(error)))
    return runs, left


def _label(row: Mapping[str, str]) -> str:
    degrees = " ".join(
        f"{k}{row[k]}" for k in ("dp", "tp", "sp", "cp", "pp", "ep") if row[k] not in ("", "1", "0")
    )
    return f"{row['model']} {row['n_devices']}x{row['hardware'][:12]} {degrees} mb{row['microbatch'] or '?'}"


@functools.cache
def _table(name: str) -> dict[str, Any]:
    with (_HERE / name).open("rb") as file:
        return tomllib.load(file)


def parse(row: Mapping[str, str]) -> Run:
    """Read one row. Raises NotExpressible."""
    architecture = _architecture(row)
    frameworks = _table("frameworks.toml")
    framework = {**frameworks["default"], **frameworks.get(row["framework"], {})}
    precision = row["precision"].lower()
    low = "fp8" in precision or "float8" in precision
    if "nvfp4" in precision:
        raise NotExpressible("4-bit products")
    if low:
        framework = {**framework, "calibration": framework["calibration"] + "-fp8"}
    if "LoRA" in row["model"]:
        raise NotExpressible("LoRA: most parameters are frozen")
    topology = _topology(row)
    return Run(
        source=re.sub(r" (line|L)\s?\d.*", "", row["source"]),
        cell=tuple(row[k] for k in ("model", "hardware", "n_devices", "global_batch_seqs", "seq_len")),
        label=_label(row),
        architecture=architecture,
        topology=topology,
        layout=_layout(row, architecture, topology, framework),
        framework=framework,
        dtype="float8_e4m3fn" if low else "bfloat16",
        seconds=_seconds(row, architecture, framework),
        peak_bytes=float(row["peak_mem_GB_per_device"]) * 2**30 if row["peak_mem_GB_per_device"] else None,
    )


def _whole(row: Mapping[str, str], key: str) -> int:
    found = re.match(r"\s*([\d.]+)\s*(k?)", row[key])
    if not found:
        raise NotExpressible(f"no {key}")
    return int(float(found[1]) * (1000 if found[2] else 1))


def _architecture(row: Mapping[str, str]) -> Architecture:
    name = row["model"].lower()
    if row["ep"] not in ("", "1") or re.search(
        r"moe|mixtral|a3b|a22b|deepseek|nemotron_3|gpt.oss|qwen3-235", name
    ):
        raise NotExpressible("mixture of experts: what moves over an expert axis is not priced yet")
    if "t5" in name:
        raise NotExpressible("encoder-decoder")
    embed = _whole(row, "d_model")
    gated = bool(re.search(r"llama|qwen|mistral|fuji|gemma", name))
    mlp = _whole(row, "d_ff") if row["d_ff"] else 4 * embed
    if not row["d_ff"] and gated:
        raise NotExpressible("no d_ff")
    heads = _whole(row, "n_heads")
    if not row["seq_len"]:
        raise NotExpressible("no sequence length")
    vocab = _whole(row, "vocab") if row["vocab"] else 51_200 if "gpt" in name else None
    if vocab is None:
        raise NotExpressible("no vocabulary size")
    found = Architecture(
        head_dim=embed // heads // 2 * 2,
        layers=_whole(row, "n_layers"),
        embed=embed,
        heads=heads,
        kv_heads=_whole(row, "n_kv_heads") if row["n_kv_heads"] else heads,
        mlp=mlp,
        vocab=vocab,
        sequence=_whole(row, "seq_len"),
        batch=_whole(row, "global_batch_seqs"),
        gated=gated,
        tied=not gated,
    )
    return _by_size(found, row) if "maxtext" in name else found


def _by_size(arch: Architecture, row: Mapping[str, str]) -> Architecture:
    """Return the variant whose size is nearest to what the row states, where it does not state all."""
    stated = float(row["params_B"]) * 1e9
    variants = [
        dataclasses.replace(arch, gated=gated, tied=False, head_dim=head_dim)
        for gated in (True, False)
        for head_dim in (arch.head_dim, 128, 256)
    ]
    return min(variants, key=lambda variant: abs(math.log(variant.weights / stated)))


def _topology(row: Mapping[str, str]) -> Topology:
    text = f"{row['hardware']} {row['source']}"
    if re.search(r"GB300|B300|MI355|H800|V100|TPU v3", row["hardware"]):
        raise NotExpressible(f"{row['hardware'].split()[0]} is not in chips.toml")
    cluster = next((c for c in _table("clusters.toml")["cluster"] if re.search(c["match"], text)), None)
    if cluster is None:
        raise NotExpressible(f"hardware {row['hardware']!r} is not known")
    facts = {k: v for k, v in cluster.items() if k not in ("match", "chip")}
    chip = dataclasses.replace(chip_named(cluster["chip"]), **facts)
    devices = _whole(row, "n_devices")
    if chip.torus_dims:
        return _torus(chip.name, devices, row)
    per_host = min(devices, chip.chips_per_host or devices)
    if devices % per_host:
        raise NotExpressible(f"{devices} devices are no whole hosts of {per_host}")
    return Topology(chip=chip, shape=(devices // per_host, per_host))


def _torus(chip: str, devices: int, row: Mapping[str, str]) -> Topology:
    slices = re.search(r"x(\d+)(?: slices)?$", row["hardware"])
    count = int(slices[1]) if slices else 2 if "2 pods" in row["hardware"] else 1
    each = devices // count
    dims = 2 if chip in ("v5e", "v6e") else 3
    for shape in _shapes(each, dims):
        try:
            return read_topology(f"{count}*{chip}:{'x'.join(map(str, shape))}")
        except UserError:
            continue
    raise NotExpressible(f"no {chip} slice has {each} chips")


def _shapes(chips: int, dims: int) -> list[tuple[int, ...]]:
    """Return shapes of `chips` chips, the most cubic first."""
    if dims == 1:
        return [(chips,)]
    found = [
        (a, *rest)
        for a in range(1, chips + 1)
        if chips % a == 0
        for rest in _shapes(chips // a, dims - 1)
        if a <= rest[0]
    ]
    return sorted(found, key=lambda shape: max(shape) - min(shape))


def _seconds(
    row: Mapping[str, str], architecture: Architecture, framework: Mapping[str, Any]
) -> float | None:
    if row["kind"] in ("oom", "failed_or_oom"):
        return None
    if row["measured_step_time_s"]:
        return float(row["measured_step_time_s"])
    if row["tokens_per_s_per_device"]:
        tokens = architecture.batch * architecture.sequence
        return tokens / float(row["tokens_per_s_per_device"]) / _whole(row, "n_devices")
    counts = framework["tflops"]
    if row["measured_tflops_per_device"] and counts:
        again = 4.0 / 3.0 if counts == "with recompute" else 1.0
        rate = float(row["measured_tflops_per_device"]) * 1e12 * _whole(row, "n_devices")
        return again * architecture.step_flops / rate
    raise NotExpressible("no step time, no tokens per second, and flops of unknown counting")


def _degree(row: Mapping[str, str], key: str) -> int:
    return int(row[key]) if row[key] else 1


def _layout(
    row: Mapping[str, str], arch: Architecture, topology: Topology, framework: Mapping[str, Any]
) -> dict[str, Any]:
    """Return mesh, storage, recomputation and microbatches as the row says them."""
    tensor, context, stage = (_degree(row, k) for k in ("tp", "cp", "pp"))
    devices = _whole(row, "n_devices")
    replicas, rest = divmod(devices, tensor * context * stage)
    if rest:
        raise NotExpressible(f"{tensor} x {context} x {stage} does not divide {devices} devices")
    zero_text = row["fsdp_zero_stage"]
    named = re.search(r"fsdp\s*=?\s*(\d+)", zero_text)
    fsdp = int(named[1]) if named else math.gcd(replicas, replicas // topology.num_slices)
    if "256-way per pod" in zero_text:
        fsdp = 256
    if replicas % fsdp:
        raise NotExpressible(f"fsdp {fsdp} does not divide {replicas} replicas")
    if "fsdp" in zero_text.lower():
        zero = 2 if "ZeRO-2" in zero_text else 3
    elif zero_text[:1].isdigit():
        zero = int(zero_text[0])
    else:
        zero = 1 if "distopt" in zero_text else framework["zero"]
    if arch.batch % replicas:
        raise NotExpressible(f"{arch.batch} sequences are not shared by {replicas} replicas")
    microbatches = _microbatches(row, arch.batch // replicas, stage)
    if tensor > 1 and arch.kv_heads % tensor and (arch.heads // arch.kv_heads) % tensor:
        raise NotExpressible(f"tp={tensor} divides neither {arch.kv_heads} kv heads nor what shares them")
    interleave = re.search(r"(?:VP=|v=|VPP=)(\d+)", row["schedule_interleave"])
    recompute = row["recompute"]
    remat = framework["remat"]
    if recompute.startswith("full"):
        remat = "full"
    elif recompute.startswith("minimal") or "offload" in recompute:
        remat = "dots"
    elif recompute:
        remat = framework["remat"] if recompute.startswith("selective") else "none"
    return {
        "mesh": {
            "data": replicas // fsdp,
            "fsdp": fsdp,
            "tensor": tensor,
            "context": context,
            "stage": stage,
        },
        "sequence_parallel": row["sp"] == "1" or (not row["sp"] and tensor > 1),
        "zero": zero,
        "remat": remat,
        "microbatches": microbatches,
        "interleave": int(interleave[1]) if interleave and stage > 1 else 1,
    }


def _microbatches(row: Mapping[str, str], per_replica: int, stage: int) -> int:
    if row["microbatch"]:
        # A microbatch that does not divide leaves a smaller last one.
        return max(1, math.ceil(per_replica / float(row["microbatch"])))
    if row["grad_accum"]:
        return int(float(row["grad_accum"]))
    return per_replica if stage > 1 else 1


def candidate(run: Run, program: Any) -> Candidate:
    """Return the candidate of a row over its traced program."""
    layout, mesh = run.layout, run.layout["mesh"]
    axes: dict[int, tuple[str, ...]] = {}
    if program.batch_dims:
        axes[program.batch_dims[0]] = ("data", "fsdp")
    tensor_first = "kv_heads" if run.architecture.kv_heads % mesh["tensor"] == 0 else "heads"
    for argument in program.parameters:
        for name, dims in zip(argument.names, argument.dims, strict=True):
            if not dims:
                continue
            if name == "heads":
                by_size = {program.dims[d].name.split(".")[0]: d for d in dims}
                axes[by_size.get(tensor_first, dims[0])] = ("tensor",)
            elif name in ("mlp", "vocab"):
                axes[dims[0]] = ("tensor",)
            elif name == "layers":
                axes[dims[0]] = ("stage",)
    along = (("context",) if mesh["context"] > 1 else ()) + (
        ("tensor",) if layout["sequence_parallel"] else ()
    )
    tokens = next(a for a in program.arguments if not a.is_parameter)
    for dim in tokens.dims[1]:
        axes[dim] = along
    shards = {
        a.index: (("data", "fsdp", "context"), *((),) * (len(a.shape) - 1))
        if layout["zero"] < 3
        else (("fsdp", "context"), *((),) * (len(a.shape) - 1))
        for a in program.parameters
    }
    # On top of what they are computed with.
    for a in program.parameters:
        own = tuple(tuple(x for d in composition for x in axes.get(d, ())) for composition in a.dims)
        shards[a.index] = (shards[a.index][0] + own[0], *own[1:]) if own else ()
    none: dict[int, Any] = {}
    return Candidate(
        mesh=mesh,
        dims=axes,
        stored=shards if layout["zero"] == 3 else none,
        gradients=shards if layout["zero"] == 2 else none,
        optimizer=shards if layout["zero"] in (1, 2) else none,
        remat=layout["remat"],
        microbatches=layout["microbatches"],
        interleave=layout["interleave"],
    )
