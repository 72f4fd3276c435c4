"""A config that cannot work is refused in one sentence."""

from __future__ import annotations

import pytest
from meshwright.models import preset
from meshwright.sharding import UserError


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
