"""Chips that are not shipped: a file of the user's, and what is said where a figure is missing."""

import optax
import pytest
from meshwright.sharding import Topology, UserError, plan
from meshwright.sharding.cost.calibration import calibration_for, transferred_from
from meshwright.sharding.hardware.chip import chip_of_device_kind

OWN = """
[chips.l40s]
platform = "gpu"
device_kinds = ["NVIDIA L40S"]
peak_bf16_flops = 362e12
peak_f32_flops = 183e12
hbm_bytes = 48_305_799_168
hbm_bytes_per_second = 864e9
chips_per_host = 8
link_bytes_per_second = 32e9
links_per_chip = 1
like = "a100"
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write a file of chips and name it."""

    def write(text):
        path = tmp_path / "chips.toml"
        path.write_text(text)
        monkeypatch.setenv("MESHWRIGHT_CHIPS", str(path))

    return write


def planned(topology):
    import jax
    import jax.numpy as jnp

    def loss(params, batch):
        return jnp.mean((batch["x"] @ params["w"]) ** 2)

    shapes = {"w": jax.ShapeDtypeStruct((4096, 4096), "float32")}
    batch = {"x": jax.ShapeDtypeStruct((64, 4096), "float32")}
    return plan(loss, shapes, batch, topology=topology, optimizer=optax.sgd(0.1))


def test_a_chip_of_ones_own_is_planned_for_with_a_relatives_efficiencies(own):
    own(OWN)
    made = planned("l40s:8")
    assert made.estimate.peak_bytes < 0.75 * 48_305_799_168
    # Its own peak and memory are the slower ones.
    assert made.estimate.step_seconds > planned("a100:8").estimate.step_seconds
    assert transferred_from("l40s") == "a100"
    assert calibration_for("l40s") == calibration_for("a100")
    assert chip_of_device_kind("NVIDIA L40S", "cuda").name == "l40s"


def test_a_chip_without_a_file_says_where_to_write_one():
    with pytest.raises(UserError, match=r"'l40s' is not a chip known here; .*MESHWRIGHT_CHIPS"):
        Topology.parse("l40s:8")


def test_a_missing_figure_says_its_key(own):
    own(OWN.replace("peak_f32_flops = 183e12\n", ""))
    with pytest.raises(UserError, match=r"give peak_f32_flops in a file .*\[chips\.l40s\]"):
        planned("l40s:8")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "it has no tables"),
        ("[[", "Invalid initial character"),
        ('[chips.h100]\nplatform = "gpu"', "h100 is shipped"),
        ('[chips.a]\nplatform = "gpu"', "a says no device_kinds"),
        (OWN.replace('"gpu"', '"tpu"'), "platform='tpu'"),
        (OWN.replace("hbm_bytes =", "hbm_byte ="), "did you mean 'hbm_bytes'"),
        (OWN.replace("362e12", '"fast"'), "must be a number above 0"),
        (OWN.replace('"a100"', '"a10"'), "did you mean 'a100'"),
        (OWN + 'fabric = "torus"\n', "fabric 'torus'"),
    ],
)
def test_a_file_that_is_none_of_chips_is_told_in_one_sentence(own, text, words):
    own(text)
    with pytest.raises(UserError, match=words) as told:
        Topology.parse("l40s:8")
    assert "MESHWRIGHT_CHIPS" in str(told.value)
