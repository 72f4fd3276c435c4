"""Layouts that people tuned by hand for MaxText, as models, topologies and declared parts of a plan."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshwright.models.transformer.config import DecoderConfig, preset
from meshwright.sharding import Topology, UserError

from .shapes import NotExpressible

# What the table leaves out is MaxText's default.
_SEQUENCE = 2048
_AXES = {
    "data": "data",
    "fsdp": "fsdp",
    "fsdp_transpose": "fsdp",
    "tensor": "tensor",
    "expert": "expert",
    "context": "context",
    "pipeline": "stage",
}
_PRESETS = {"llama3.1-405b": "llama3-405b"}
# Shapes that no preset has: (layers, embed, heads, mlp, vocab, gated).
_SHAPES = {
    "llama2-13b": (40, 5120, 40, 13_824, 32_000, True),
    "gpt3-175b": (96, 12_288, 96, 49_152, 50_304, False),
}
# MaxText's names of what a layer may keep, as `meshwright.sharding.program.layers` names it.
_QKV = ("attention/query", "attention/key", "attention/value")
_VALUES = {
    "decoder_layer_input": ("layer:in",),
    "query_proj": _QKV[:1],
    "key_proj": _QKV[1:2],
    "value_proj": _QKV[2:],
    "qkv_proj": _QKV,
    "context": ("attention/output:in",),
    "out_proj": ("attention/output",),
    "mlpwi": ("mlp/gate", "mlp/up"),
    "mlpwi_0": ("mlp/gate",),
    "mlpwi_1": ("mlp/up",),
    "mlpwo": ("mlp/down",),
}
_DOTS = (*_QKV, "attention/output", "mlp/gate", "mlp/up", "mlp/down")
_POLICIES = {
    "save_qkv_proj": _QKV,
    "qkv_proj_offloaded": _QKV,
    "save_out_proj": ("attention/output",),
    "save_dot_except_mlpwi": (*_QKV, "attention/output", "mlp/down"),
    "save_dot_except_mlp": (*_QKV, "attention/output"),
    "save_dot_with_context_except_mlp": (*_QKV, "attention/output", "attention/output:in"),
    "minimal": _DOTS,
    "minimal_with_context": (*_DOTS, "attention/output:in"),
}
# TPU names of v4 and v5p count cores, two a chip.
_CORES = {"v4": 2, "v5p": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
    """One hand-tuned layout. `remat` maps a layer's saved values to where they are kept, or is a policy."""

    name: str
    config: DecoderConfig
    topology: Topology
    sequence: int
    batch: int
    mesh: Mapping[str, int]
    remat: str | Mapping[str, str]
    microbatches: int
    low_precision: bool


def load(path: Path) -> tuple[list[Tuned], list[tuple[str, str]]]:
    """Return the rows of a CSV, and (name, reason) of those that cannot be expressed."""
    found, left = [], []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            name = f"{row['name']} ({row['topology'] or row['hw']})"
            try:
                found.append(_parse(name, row))
            except (NotExpressible, UserError) as error:
                left.append((name, str(error)))
    return found, left


def _parse(name: str, row: Mapping[str, str]) -> Tuned:
    other = json.loads(row["other"] or "{}")
    sequence = _number(row["max_target_length"] or str(_SEQUENCE), "max_target_length")
    config = _config(row["model"], other, int(sequence))
    degrees = _degrees(row["parallelism"])
    topology = _topology(row, degrees)
    mesh = _mesh(degrees, topology)
    each = _number(row["per_device_batch_size"], "per_device_batch_size")
    batch = each * topology.num_devices
    if batch != int(batch):
        raise NotExpressible(f"{each} rows on each of {topology.num_devices} devices are no whole batch")
    return Tuned(
        name=name,
        config=config,
        topology=topology,
        sequence=int(sequence),
        batch=int(batch),
        mesh=mesh,
        remat=_remat(row),
        microbatches=int(row["gradient_accumulation_steps"] or 1),
        low_precision=bool(row["quantization"]),
    )


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise NotExpressible(f"no {what}") from None


def _config(model: str, other: Mapping[str, Any], sequence: int) -> DecoderConfig:
    if dims := re.match(r"emb(\d+) mlp(\d+) L(\d+) q=kv=(\d+) hd(\d+) V(\d+)", other.get("dims", "")):
        embed, mlp, layers, heads, head_dim, vocab = map(int, dims.groups())
        return _shaped(layers, embed, heads, head_dim, mlp, vocab, True, sequence)
    if "base_emb_dim" in other:
        embed, heads = int(other["base_emb_dim"]), int(other["base_num_query_heads"])
        head_dim = int(other.get("head_dim", 128))
        return _shaped(
            int(other["base_num_decoder_layers"]),
            embed,
            heads,
            head_dim,
            int(other["base_mlp_dim"]),
            32_000,
            True,
            sequence,
        )
    if model in _SHAPES:
        layers, embed, heads, mlp, vocab, gated = _SHAPES[model]
        return _shaped(layers, embed, heads, embed // heads, mlp, vocab, gated, sequence)
    return preset(
        _PRESETS.get(model, model),
        max_sequence=sequence,
        compute_dtype="bfloat16",
        attention_chunk=sequence,
    )


def _shaped(
    layers: int, embed: int, heads: int, head_dim: int, mlp: int, vocab: int, gated: bool, sequence: int
) -> DecoderConfig:
    return DecoderConfig(
        layers=layers,
        embed=embed,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        mlp=mlp,
        vocab=vocab,
        max_sequence=sequence,
        activation="swiglu" if gated else "gelu",
        attention_chunk=sequence,
    )


def _degrees(text: str) -> dict[tuple[str, str], int]:
    """Return (``ici`` or ``dcn``, axis) → degree; -1 takes the rest."""
    found: dict[tuple[str, str], int] = {}
    for key, value in json.loads(text or "{}").items():
        network, _, rest = key.partition("_")
        axis = _AXES.get(rest.removesuffix("_parallelism"))
        if axis is None or not re.fullmatch(r"-?\d+", str(value)):
            raise NotExpressible(f"{key}={value}")
        size = int(value)
        before = found.get((network, axis), 1)
        found[network, axis] = -1 if -1 in (before, size) else before * size
    return found


def _topology(row: Mapping[str, str], degrees: Mapping[tuple[str, str], int]) -> Topology:
    text = row["topology"]
    slices = math.prod(size for (network, _), size in degrees.items() if network == "dcn" and size > 1)
    if vms := re.match(r"(\d+) VM x 8 H100", text):
        return Topology.parse(f"h100:{vms[1]}x8")
    if "H100" in row["hw"] and slices > 1:
        return Topology.parse(f"h100:{slices}x8")
    prefix = f"{slices}*" if slices > 1 else ""
    if shaped := re.match(r"(\w+)-(\d+x\d+x\d+)$", text):
        return Topology.parse(f"{prefix}{shaped[1]}:{shaped[2]}")
    custom = re.search(r"custom (\d+x\d+x\d+)", text)
    named = re.match(r"(v\d\w?)[-_](\d+)", text)
    if custom and named:
        return Topology.parse(f"{prefix}{named[1]}:{custom[1]}")
    if not named:
        raise NotExpressible("no topology")
    chip, chips = named[1], int(named[2]) // _CORES.get(named[1], 1)
    for shape in _shapes(chips, 3 if chip in _CORES else 2):
        try:
            return Topology.parse(f"{prefix}{chip}:{shape}")
        except UserError:
            continue
    raise NotExpressible(f"no {chip} slice has {chips} chips")


def _shapes(chips: int, dims: int) -> list[str]:
    """Return shapes of `chips` chips, the most cubic first."""
    if dims == 2:
        pairs = [(a, chips // a) for a in range(1, math.isqrt(chips) + 1) if chips % a == 0]
        return [f"{a}x{b}" for a, b in reversed(pairs)]
    found = [
        (a, b, chips // a // b)
        for a in range(1, chips + 1)
        if chips % a == 0
        for b in range(a, chips // a + 1)
        if chips // a % b == 0 and chips // a // b >= b
    ]
    return ["x".join(map(str, shape)) for shape in sorted(found, key=lambda shape: shape[-1] - shape[0])]


def _mesh(degrees: Mapping[tuple[str, str], int], topology: Topology) -> dict[str, int]:
    """Return axis → size with what absorbs the rest worked out; without any degree all is FSDP."""
    sizes = {"data": 1, "fsdp": 1, "tensor": 1}
    absorbing = []
    for (network, axis), size in degrees.items():
        if size == -1:
            if network == "ici" or topology.num_slices > 1:
                absorbing.append(axis)
        else:
            sizes[axis] = sizes.get(axis, 1) * size
    left, rest = divmod(topology.num_devices, math.prod(sizes.values()))
    if rest:
        raise NotExpressible(f"{sizes} does not divide {topology.num_devices} devices")
    if left > 1:
        axis = absorbing[0] if absorbing else "fsdp"
        sizes[axis] = sizes.get(axis, 1) * left
    return {axis: size for axis, size in sizes.items() if size > 1 or axis in ("data", "fsdp", "tensor")}


def _remat(row: Mapping[str, str]) -> str | dict[str, str]:
    policy = row["remat_policy"]
    if policy in ("full", ""):
        return "full"
    if policy in _POLICIES:
        place = "host" if policy.endswith("offloaded") else "device"
        return dict.fromkeys(_POLICIES[policy], place)
    if policy == "custom":
        places = {"offload": "host", "device": "device"}
        chosen = {name: places[place] for name, place in json.loads(row["remat_custom"]).items()}
        return {value: place for name, place in chosen.items() for value in _VALUES[name]}
    raise NotExpressible(f"remat_policy={policy}")
