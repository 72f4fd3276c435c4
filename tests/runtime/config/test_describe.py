"""The settings and presets in words."""

from __future__ import annotations

import pytest
from meshwright.models import presets
from meshwright.runtime.config import Config, describe_presets, describe_settings, fields, parse


def test_every_setting_has_words_a_type_and_a_line_to_copy() -> None:
    text = describe_settings()
    lines = text.splitlines()
    for dotted, _, _, description in fields():
        (at,) = [n for n, line in enumerate(lines) if line.startswith(f"{dotted}=")]
        above = []
        while lines[at - 1].startswith("  # "):
            at -= 1
            above.append(lines[at].removeprefix("  # "))
        words = " ".join(reversed(above))
        assert words.startswith(" ".join(description.split()))
        assert words.endswith("]")
    assert max(map(len, lines)) <= 110


def test_the_lines_give_the_defaults() -> None:
    lines = [line for line in describe_settings().splitlines() if line and line.lstrip()[0] != "#"]
    words = [line for line in lines if not line.startswith(("model.preset=", "model.build="))]
    assert len(words) == len(list(fields())) - 2
    assert parse({}, words) == Config()


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ("optimizer.name", "[adamw | adafactor | lion | muon]"),
        ("optimizer.learning_rate", "[float]"),
        ("train.steps", "[int]"),
        ("optimizer.clip_norm", "[float | null]"),
        ("mesh", "[dict of str, int | null]"),
    ],
)
def test_types_are_written_as_a_person_would(setting: str, kind: str) -> None:
    lines = describe_settings().splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith(f"{setting}="))
    assert " ".join(line.strip(" #") for line in lines[at - 4 : at]).endswith(kind)


def test_every_preset_has_a_row() -> None:
    from rich.console import Console

    with (console := Console(width=120)).capture() as captured:
        console.print(describe_presets())
    rows = {line.split()[0]: line.split()[1:] for line in captured.get().splitlines()[1:] if line.strip()}
    assert set(rows) == set(presets())
    assert rows["llama3-8b"] == ["32", "4,096", "32", "8", "14,336", "128,256"]
