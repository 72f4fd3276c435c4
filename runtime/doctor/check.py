"""One thing that the doctor looked at, and all of them as a table."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Status = Literal["ok", "warn", "bad"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at: what it is, whether that is well, and what to do if not."""

    name: str
    value: str
    status: Status = "ok"
    advice: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the finding as JSON can hold it."""
        return dataclasses.asdict(self)


def render(findings: list[Check]) -> Any:
    """Return a rich table of `findings`, with what to do under those that need it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    style = {"ok": "green", "warn": "yellow", "bad": "bold red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        value = Text(finding.value)
        if finding.advice:
            value.append(
                f"\n→ {finding.advice}", style="dim" if finding.status == "ok" else style[finding.status]
            )
        table.add_row(Text(finding.status, style=style[finding.status]), finding.name, value)
    wrong = [finding.name for finding in findings if finding.status == "bad"]
    verdict = f"wrong: {', '.join(wrong)}" if wrong else "nothing is wrong"
    return Group(table, Text(verdict, style=style["bad" if wrong else "ok"]))
