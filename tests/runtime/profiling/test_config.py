"""What a user may write under `profile`."""

import pytest
from meshwright.runtime.profiling import ProfileConfig
from pydantic import ValidationError


def test_nothing_is_captured_unless_asked_for():
    assert ProfileConfig().start_step is None


def test_a_window_too_long_is_refused_with_the_reason():
    with pytest.raises(ValidationError, match=r"num_steps=21 is too long a window: .* nearest: 20"):
        ProfileConfig(start_step=1, num_steps=21)


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"start_step": -1}, {"steps": 3}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValidationError):
        ProfileConfig(**wrong)


def test_every_field_is_documented():
    assert all(field.description for field in ProfileConfig.model_fields.values())
