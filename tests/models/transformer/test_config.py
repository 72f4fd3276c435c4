"""A config that cannot work is refused in one sentence; presets have the published number of parameters."""

from __future__ import annotations

import pytest
from meshwright.models import decoder, preset, preset_facts, presets
from meshwright.sharding import UserError

PUBLISHED = [name for name in presets() if name != "tiny"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4; nearest: 2 or 4"),
        ({"head_dim": 33}, "head_dim=33 is odd"),
        ({"layers": 0}, "layers=0 must be a whole number of at least 1"),
        ({"layers": True}, "layers=True must be a whole number"),
        ({"embed": "128"}, "embed='128' must be a whole number"),
        ({"activation": "swigl"}, "did you mean 'swiglu'"),
        ({"compute_dtype": "bf16"}, "compute_dtype='bf16' is not known"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 must be a number above 0"),
        ({"z_loss": -0.1}, "z_loss=-0.1"),
        ({"expert_capacity": True}, "expert_capacity=True must be a number above 0"),
        ({"tied_embeddings": "false"}, "tied_embeddings='false' must be true or false"),
        ({"global_every": 6}, "global_every=6 has no effect without a window"),
        ({"rope_local_theta": 1e4}, "has no effect without global_every"),
        ({"norm": "layer", "norm_offset": True}, "norm_offset=true applies to norm='rms' only"),
        ({"position_embedding": "learned", "rope_scaling": "linear"}, "no effect with learned positions"),
        ({"rope_factor": 8.0}, "rope_factor=8.0 has no effect"),
        ({"rope_scaling": "llama3", "rope_low_frequency_factor": 4.0}, "must be above 0 and below"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        preset("tiny", **changes)
    assert words in str(caught.value)


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
