"""The model of a measured row: what a decoder is built from."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
# Megatron pads its vocabulary to a multiple of this (make_vocab_size_divisible_by).
_VOCAB_MULTIPLE = 128
# A mixture of experts whose shape is not published, or is no decoder of attention and MLP alone.
_OTHER_MIXTURES = r"nemotron_3|deepseek.?v4|gpt.oss|moe|a3b|a22b|mixtral"
# Rows of these say neither a gate nor d_ff: their MLP is four times as wide as the stream.
_GATED = r"llama|qwen|mistral|mixtral|fuji|gemma|deepseek"


class NotExpressible(Exception):
    """A row that this library's programs or candidates cannot say; its text is the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a decoder is built from; `gated`: its MLP has a gate; `extra`: more fields of its config."""

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
    extra: tuple[tuple[str, Any], ...] = ()

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


def whole(row: Mapping[str, str], key: str) -> int:
    """Return the number in a column. Raises NotExpressible where there is none."""
    found = re.match(r"\s*([\d.]+)\s*(k?)", row[key])
    if not found:
        raise NotExpressible(f"no {key}")
    return int(float(found[1]) * (1000 if found[2] else 1))


@functools.cache
def _published() -> tuple[Mapping[str, Any], ...]:
    with (_HERE / "models.toml").open("rb") as file:
        return tuple(tomllib.load(file)["model"])


def read_shape(row: Mapping[str, str]) -> Architecture:
    """Return the architecture of a row. Raises NotExpressible."""
    name = row["model"].lower()
    if "t5" in name:
        raise NotExpressible("encoder-decoder")
    known = next((model for model in _published() if re.search(model["match"], name)), None)
    if known is None and (row["ep"] not in ("", "1") or re.search(_OTHER_MIXTURES, name)):
        raise NotExpressible("mixture of experts whose shape is in no row and not in models.toml")
    fallback = known or {}

    def number(column: str, field: str) -> int:
        return whole(row, column) if row[column] or field not in fallback else int(fallback[field])

    if not row["seq_len"]:
        raise NotExpressible("no sequence length")
    embed, heads = number("d_model", "embed"), number("n_heads", "heads")
    gated = bool(fallback.get("gated", re.search(_GATED, name)))
    if not row["d_ff"] and gated and "mlp" not in fallback:
        raise NotExpressible("no d_ff")
    if not row["vocab"] and "gpt" not in name and "vocab" not in fallback:
        raise NotExpressible("no vocabulary size")
    found = Architecture(
        head_dim=fallback.get("head_dim", embed // heads // 2 * 2),
        layers=number("n_layers", "layers"),
        embed=embed,
        heads=heads,
        kv_heads=number("n_kv_heads", "kv_heads") if row["n_kv_heads"] or known else heads,
        mlp=number("d_ff", "mlp") if row["d_ff"] or known else 4 * embed,
        vocab=number("vocab", "vocab") if row["vocab"] or known else 51_200,
        sequence=whole(row, "seq_len"),
        batch=_batch(row),
        gated=gated,
        tied=not gated,
        extra=tuple(sorted(fallback.get("extra", {}).items())),
    )
    if "Megatron" in row["framework"]:
        found = dataclasses.replace(found, vocab=-(-found.vocab // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE)
    if "maxtext" in name and known is None:
        return _by_size(found, row)
    return dataclasses.replace(found, tied=_is_tied(found, row)) if gated and not found.extra else found


def _batch(row: Mapping[str, str]) -> int:
    """Return the sequences of a step; of two that a row leaves open, the one that its own flops tell."""
    stated = whole(row, "global_batch_seqs")
    other = re.search(r"GBS ambiguous.*?says (\d+)", row["notes"])
    told = [
        row[key] for key in ("params_B", "measured_step_time_s", "measured_tflops_per_device", "n_devices")
    ]
    if not other or not all(told):
        return stated
    billions, seconds, tera, devices = (float(value) for value in told)
    sequences = tera * 1e12 * seconds * devices / (8.0 * billions * 1e9 * float(row["seq_len"]))
    return min((stated, int(other[1])), key=lambda batch: abs(math.log(batch / sequences)))


def _is_tied(arch: Architecture, row: Mapping[str, str]) -> bool:
    """Return whether the stated size is nearer to that of a model whose output is its embedding table."""
    if not row["params_B"]:
        return False
    stated = float(row["params_B"]) * 1e9
    return abs(arch.weights - stated) < abs(arch.weights + arch.embed * arch.vocab - stated)


def _by_size(arch: Architecture, row: Mapping[str, str]) -> Architecture:
    """Return the variant whose size is nearest to what the row states, where it does not state all."""
    stated = float(row["params_B"]) * 1e9
    variants = [
        dataclasses.replace(arch, gated=gated, tied=False, head_dim=head_dim)
        for gated in (True, False)
        for head_dim in (arch.head_dim, 128, 256)
    ]
    return min(variants, key=lambda variant: abs(math.log(variant.weights / stated)))
