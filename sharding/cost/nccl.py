"""Seconds of a collective by NCCL, which takes the fastest of its ways: rings, trees, sums in the switch.

A ring moves least, and visits every device. A tree visits log2 of the domains, at half the rate at most. The
protocols of low latency pay less for each step and more for each byte. With hundreds of hosts a ring's way
round takes milliseconds, and a small array goes by tree. Figures and sources: ``nccl.toml``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_FACTS = Path(__file__).with_name("nccl.toml")
KINDS = ("all_gather", "reduce_scatter", "all_reduce")


@functools.cache
def _facts() -> Mapping[str, Any]:
    with _FACTS.open("rb") as file:
        return tomllib.load(file)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Devices that communicate.

    size, domains:  devices, and the fast domains over which they stand.
    link, network:  bytes a second that collectives reach on a device's fast links, and on its adapter.
    switch_sums:    share of the fast links' rate at which a domain's switch sums; None where it cannot.
    step, hop:      how much longer steps inside of domains and between them take than in ``nccl.toml``.
    """

    size: int
    domains: int
    link: float
    network: float
    switch_sums: float | None = None
    step: float = 1.0
    hop: float = 1.0

    @property
    def inside(self) -> int:
        """Devices of the group on each domain."""
        return math.ceil(self.size / self.domains)

    @property
    def rate(self) -> float:
        """Bytes a second of a ring, which enters and leaves a domain by the adapters of all members there."""
        return self.link if self.domains == 1 else min(self.link, self.inside * self.network)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ways:
    """The ways of one kind: seconds before the first byte [W], and for each byte that the group holds [W]."""

    starts: np.ndarray
    per_byte: np.ndarray

    def seconds(self, bytes_: Any, count: Any = 1.0) -> Any:
        """Return the seconds of `count` collectives that move `bytes_` together; numbers or arrays alike.

        They are of one size, and go by the way that is fastest for that.
        """
        every = np.multiply.outer(self.starts, count) + np.multiply.outer(self.per_byte, bytes_)
        return every.min(axis=0)


@functools.lru_cache(maxsize=1024)
def ways(group: Group) -> Mapping[str, Ways]:
    """Return kind → the ways in which `group` may carry it out.

    >>> host = ways(Group(size=8, domains=1, link=382e9, network=35e9, switch_sums=0.81))
    >>> [round(float(host["all_reduce"].seconds(size)) * 1e6) for size in (2**16, 2**24, 2**30)]
    [16, 108, 4001]
    """
    found = {}
    for kind in KINDS:
        lines = _rings(kind, group)
        if kind == "all_reduce":
            lines += _trees(group)
            if group.switch_sums is not None and group.size > 2:
                lines += _in_switch(group, group.switch_sums)
        elif group.domains == group.size:
            lines.append(_parts(group))
        starts, per_byte = zip(*lines, strict=True)
        found[kind] = Ways(starts=np.array(starts), per_byte=np.array(per_byte))
    return found


def _rings(kind: str, group: Group) -> list[tuple[float, float]]:
    """Return seconds, and seconds a byte, of rings by protocol.

    In n - 1 steps (twice that in an all-reduce) each device passes on 1 / n of the array.
    """
    passes = 2 if kind == "all_reduce" else 1
    steps, hops = passes * (group.size - group.domains), passes * (group.domains - 1)
    found = []
    for name, row in _facts()["ring"].items():
        inside, rate = row["inside_seconds"], row["share"] * group.rate
        if name == "ll":
            inside *= row["slower_inside"] if group.domains > 1 else 1.0
            rate = min(rate, _most(group, row))
        start = (
            group.step * (row["base_seconds"] + steps * inside) + group.hop * hops * row["network_seconds"]
        )
        found.append((start, passes * (group.size - 1) / group.size / rate))
    return found


def _most(group: Group, row: Mapping[str, float]) -> float:
    if group.domains == 1:
        return row["most_of_link"] * group.link
    return row["most_of_two"] if group.domains == 2 else row["most_of_many"]


def _trees(group: Group) -> list[tuple[float, float]]:
    """Return those of trees: up and down again, over log2 of the domains, at half of a ring's rate."""
    deep = math.log2(group.domains)
    found = []
    for row in _facts()["tree"].values():
        inside, hops = (group.inside - 1) * row["inside_seconds"], deep * row["network_seconds"]
        start = group.step * (row["base_seconds"] + 2 * inside) + group.hop * 2 * hops
        found.append((start, 2.0 / (row["share"] * group.rate)))
    return found


def _in_switch(group: Group, share: float) -> list[tuple[float, float]]:
    """Return those of sums in the switch.

    A device's links carry all of the array and its own part of it, 1 + 1 / n, instead of 2 (n - 1) / n. Over
    domains a tree of them, whose inner domains have two others below them, goes at half the network's rate.
    """
    row, inside = _facts()["in_switch"], max(group.inside, 1)
    summed = (1.0 + 1.0 / inside) / (share * group.link)
    if group.domains == 1:
        return [(group.step * start, summed / part) for start, part in row["lines"]]
    if inside < 2:
        return []
    over = 2.0 * (group.size - 1) / group.size / (inside * group.network)
    start = group.step * row["tree_seconds"]
    start += group.hop * 2 * math.log2(group.domains) * row["network_seconds"]
    return [(start, max(summed, over * (1.0 if group.domains == 2 else 2.0)))]


def _parts(group: Group) -> tuple[float, float]:
    row = _facts()["parts"]
    start = group.step * row["base_seconds"] + group.hop * (
        math.log2(group.domains) * row["network_seconds"] + group.size * row["device_seconds"]
    )
    return start, (group.size - 1) / group.size / (row["share"] * group.rate)
