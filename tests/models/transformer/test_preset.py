"""Presets have the published number of parameters, and wrong names are answered with right ones."""

from __future__ import annotations

import pytest
from meshwright.models import decoder, preset, preset_facts, presets
from meshwright.sharding import UserError

PUBLISHED = [name for name in presets() if name != "tiny"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_total(name: str) -> None:
    assert decoder(preset(name)).num_parameters == preset_facts(name)["parameters"]


def test_every_shape_of_the_family_is_there() -> None:
    wanted = (
        "llama3-8b llama3-70b llama3-405b llama2-7b llama2-70b qwen3-8b gemma3-27b mistral-7b gpt-125m tiny"
    )
    assert set(wanted.split()) <= set(presets())
    assert all(preset_facts(name)["source"] for name in presets())


def test_overrides_replace_fields_and_are_checked() -> None:
    assert preset("llama3-8b", layers=2).layers == 2
    with pytest.raises(UserError, match="no preset 'llama3-7b'; did you mean 'llama3-"):
        preset("llama3-7b")
    with pytest.raises(UserError, match="no field 'layer'; did you mean 'layers'"):
        preset("llama3-8b", layer=2)


def test_flops_follow_from_shape_and_sequence() -> None:
    model = decoder(preset("llama3-8b"))
    # Six a matrix parameter; a query of 8192 sees 4096 keys in each layer, at 12 · 32 · 128.
    matrices = 8_030_261_248 - 128_256 * 4096 - (2 * 32 + 1) * 4096
    assert model.flops_per_token(8192) == 6 * matrices + 12 * 32 * 128 * 4096 * 32
    windowed, full = (decoder(preset("mistral-7b", window=window)) for window in (4096, None))
    assert windowed.flops_per_token(65_536) < full.flops_per_token(65_536)
