"""Every published decoder has a small one of its kind."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from meshwright.models import decoder, preset
from meshwright.models.transformer.config import presets
from meshwright.models.transformer.reduced import reduced


def size(whole: int, least: int) -> int:
    common = math.gcd(whole, 16)
    return min(whole, -(-least // common) * common)


@pytest.mark.parametrize("name", presets())
def test_a_small_decoder_has_what_the_whole_one_has(name: str) -> None:
    whole = preset(name)
    small = reduced(whole, size, layers=4, sequence=32, whole=4096)
    assert decoder(small).num_parameters < 1_000_000
    for field in dataclasses.fields(whole):
        old, new = getattr(whole, field.name), getattr(small, field.name)
        assert (old is None) == (new is None), field.name
        assert isinstance(old, int | float) or old == new, field.name
    # Grouped heads stay grouped, what an axis of two to eight divides stays so.
    assert (whole.heads == whole.kv_heads) == (small.heads == small.kv_heads)
    for part in ("embed", "kv_heads", "vocab", "experts"):
        assert _divides(getattr(whole, part), getattr(small, part)), part


def _divides(whole: Any, small: Any) -> bool:
    return whole is None or small == whole or all(small % n == 0 for n in (2, 4, 8) if whole % n == 0)


def test_a_window_is_as_much_of_a_row_as_it_was() -> None:
    small = reduced(preset("gemma3-27b", window=1024), size, layers=4, sequence=32, whole=8192)
    assert (small.window, small.global_every) == (4, 4)
