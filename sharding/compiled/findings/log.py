"""Findings in what a compiler prints while it works."""

from __future__ import annotations

import re

from ...plans.proof import Finding

# XLA's SPMD partitioner warns so since 2023; the sharding texts are its own.
_INVOLUNTARY = re.compile(
    r"Involuntary full rematerialization\. The compiler (?:was not able to|cannot|can't) go from sharding "
    r"(?P<source>\{.*?\}) to (?P<target>\{.*?\})(?: without| efficiently|\s)"
    r".*?HLO operation:?\s*%?(?P<name>[\w.\-]+)",
    re.S,
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def findings_in_log(text: str) -> tuple[Finding, ...]:
    """Return what a compiler's log lines say of resharding by full replication, each operation once."""
    found: dict[str, Finding] = {}
    for match in _INVOLUNTARY.finditer(text):
        following = _OP_NAME.search(text, match.end(), text.find("\n", match.end()) % (len(text) + 1))
        where = f" ({following[1]})" if following else ""
        found.setdefault(
            match["name"],
            Finding(
                kind="involuntary_full_rematerialisation",
                what=f"{match['name']}{where} is replicated to go from {match['source']} "
                f"to {match['target']}",
                remedy="shard its maker and its reader over the same axes in the same order, or put a "
                "reshape between them that keeps the sharded dimension whole",
            ),
        )
    return tuple(found.values())
