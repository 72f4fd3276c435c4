"""Records of frameworks: read, written, and the nearest wider one where there is none."""

import dataclasses
import sys
from pathlib import Path

import pytest
from meshwright.sharding import UserError
from meshwright.sharding.cost.calibration import calibration_for

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from frameworks.record import SHIPPED, Framework, plain, read, record_for, unseen, write


def test_a_file_comes_back_as_it_was_written_with_its_comment(tmp_path):
    base = Framework(matmul_efficiency=0.8, overlap_gradients=0.5)
    own = dataclasses.replace(base, matmul_efficiency=0.7, fused_attention=True)
    path = tmp_path / "c.toml"
    path.write_text("# Why.\n# And how.\n\n[default]\n")
    write(path, base, {"h100": {"somebody's": own}})
    assert read(path) == (base, {"h100": {"somebody's": own}})
    assert path.read_text().startswith("# Why.\n# And how.\n\n[default]\nmatmul_efficiency = 0.8\n")
    assert record_for("h100", "somebody's", path) == own


def test_the_shipped_file_is_as_it_would_be_written(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(SHIPPED.read_text())
    write(path, *read(path))
    assert path.read_text() == SHIPPED.read_text()


def test_a_variant_is_its_framework_where_nothing_else_is_known(tmp_path):
    own = Framework(matmul_efficiency=0.7)
    path = tmp_path / "c.toml"
    write(path, Framework(), {"h100": {"x": own}})
    assert record_for("h100", "x-fp8-async", path) == own
    for chip, framework in (("h100", "y-fp8"), ("v5e", "x")):
        found = record_for(chip, framework, path)
        own = calibration_for(chip, {"h100": "cudnn", "v5e": "splash"}[chip])
        assert {**dataclasses.asdict(found), **dataclasses.asdict(own)} == dataclasses.asdict(found)
        # Never a fallback that leaves attention unfused.
        assert found.fused_attention
        assert found.attention_share == 0.5


def test_mistakes_are_named(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[h100.x]\nreruns_layer = true\n")
    with pytest.raises(UserError, match=r"reruns_layer.*reruns_layers"):
        read(path)
    with pytest.raises(UserError, match="must not be below 0"):
        Framework(copy_bytes=-1.0)


def test_a_framework_as_never_seen_has_the_ways_of_other_families_and_the_chips_own_kernels(tmp_path):
    path = tmp_path / "c.toml"
    slow = Framework(kernel_seconds=1e-3, matmul_efficiency=0.1, fused_residuals=True)
    rows = {
        "megatron-lm": slow,
        "megatron-core": dataclasses.replace(slow, kernel_seconds=9.0),
        "nanotron": dataclasses.replace(slow, kernel_seconds=2e-3),
        "paxml": dataclasses.replace(slow, kernel_seconds=7.0),
    }
    write(
        path, Framework(), {"h100": rows, "a100": {"torchtitan": dataclasses.replace(slow, step_seconds=5.0)}}
    )
    found, own = unseen("h100", "megatron-lm-selective", path), plain("h100")
    # What no chip decides is in the middle of relatives on all of them.
    assert (found.kernel_seconds, found.fused_residuals, found.step_seconds) == (1e-3, True, 0.0)
    assert found.matmul_efficiency == own.matmul_efficiency
    # Its own family's rows are not looked at, and neither are XLA's, whose ways are the product's.
    assert unseen("h100", "maxtext", path) == own
    assert unseen("h100", "nobody-knows", path).kernel_seconds == 1e-3
    # A chip of which only its own family is known has relatives on others.
    assert unseen("a100", "torchtitan", path).kernel_seconds == 2e-3


def test_how_long_a_host_takes_is_told_by_relatives_whose_runs_moved_it(tmp_path):
    path = tmp_path / "c.toml"
    begun = Framework(kernel_seconds=1e-5, network_seconds=1e-5)
    rows = {
        "megatron-lm": dataclasses.replace(begun, kernel_seconds=1.02e-5),
        "llm-foundry": dataclasses.replace(begun, kernel_seconds=0.98e-5),
        "torchtitan": dataclasses.replace(begun, kernel_seconds=3e-5),
    }
    write(path, begun, {"h100": rows})
    found = unseen("h100", "nanotron", path)
    assert found.kernel_seconds == 3e-5
    # Nobody's runs told of the network's starts.
    assert found.network_seconds == 1e-5


def test_a_host_takes_for_a_layer_what_one_record_says_of_kernels_and_the_rest_together(tmp_path):
    path = tmp_path / "c.toml"
    begun = Framework(kernel_seconds=1e-5)
    rows = {
        "megatron-lm": dataclasses.replace(begun, layer_seconds=1e-4),
        "llm-foundry": dataclasses.replace(begun, layer_seconds=2e-4),
        "torchtitan": dataclasses.replace(begun, kernel_seconds=2e-5, layer_seconds=9e-4),
    }
    write(path, begun, {"h100": rows})
    # Devices hid the hosts of the other two, whatever their fits made of the rest of a layer.
    found = unseen("h100", "nanotron", path)
    assert (found.kernel_seconds, found.layer_seconds) == (2e-5, 9e-4)
    alone = unseen("h100", "torchtitan", path)
    assert (alone.kernel_seconds, alone.layer_seconds) == (1e-5, 1e-4)


def test_layers_are_dealt_to_stages_as_the_source_of_a_framework_says(tmp_path):
    path = tmp_path / "c.toml"
    write(path, Framework(), {"h100": {"megatron-lm": Framework(), "nanotron": Framework()}})
    assert unseen("h100", "nanotron", path).balanced_stages
    assert not unseen("h100", "megatron-lm", path).balanced_stages
    # Records that were fitted deal them in the same way.
    assert record_for("h100", "nanotron").balanced_stages
