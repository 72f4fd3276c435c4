"""Options of compilers: from data, for the chips that they were seen to help."""

from __future__ import annotations

import pytest
from meshwright.sharding import Topology, UserError
from meshwright.sharding.xla.options import (
    check_options,
    options_for,
    product_cycles,
    scatters_over_several_axes,
    trials_for,
)


@pytest.mark.parametrize("text", ["v5p:4x4x8", "2*v6e:16x16"])
def test_chips_with_sparse_cores_scatter_over_all_axes(text):
    options = options_for(Topology.parse(text))
    assert options["xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter"] is True
    assert scatters_over_several_axes(options)
    assert scatters_over_several_axes({**options, "xla_tpu_scoped_vmem_limit_kib": 98304})


@pytest.mark.parametrize("text", ["v4:4x4x4", "v5e:16x16", "tpu7x:4x4x4", "h100:4x8", "cpu:8"])
def test_other_chips_keep_the_defaults(text):
    options = options_for(Topology.parse(text))
    assert options == {}
    assert not scatters_over_several_axes(options)


def test_an_option_turned_off_is_not_taken_for_on():
    options = options_for(Topology.parse("v5p:4x4x4"))
    off = dict.fromkeys(options, False)
    assert not scatters_over_several_axes(off)


def test_what_is_handed_out_is_the_callers_own():
    first = options_for(Topology.parse("v6e:16x16"))
    first.clear()
    assert options_for(Topology.parse("v6e:16x16"))


def test_sets_to_try_are_those_of_the_chip():
    names = [trial.name for trial in trials_for(Topology.parse("v6e:16x16"))]
    assert names == ["scoped_vmem", "scheduler_memory", "sparse_cores"]
    assert trials_for(Topology.parse("cpu:8")) == []


@pytest.mark.parametrize("text", ["v4:4x4x4", "v5p:4x4x8", "v6e:16x16", "tpu7x:4x4x4"])
def test_gathers_are_fused_into_products_only_where_libtpu_supports_it(text):
    """Newer ones refuse it on other chips, and warn of wrong results."""
    offered = {name for trial in trials_for(Topology.parse(text)) for name, on in trial.options.items() if on}
    assert "xla_tpu_enable_async_collective_fusion" not in offered
    assert "async_collectives" in [trial.name for trial in trials_for(Topology.parse("v5e:16x16"))]


def test_products_are_read_by_the_windows_that_options_allow():
    v6e, v5p = Topology.parse("v6e:16x16"), Topology.parse("v5p:4x4x8")
    (first, *_) = trials_for(v6e)
    assert product_cycles({**first.options, "xla_enable_async_all_gather": True}, v6e, usual=0.8) == 1.0
    assert product_cycles({"xla_tpu_scoped_vmem_limit_kib": "131072"}, v6e, usual=0.8) == 1.0
    assert product_cycles({"xla_tpu_scoped_vmem_limit_kib": 65536}, v6e, usual=0.8) == 0.8
    assert product_cycles(first.options, v5p, usual=0.8) == 0.8


def test_names_that_a_version_refuses_are_not_offered_to_it_and_are_told_in_a_sentence():
    h100, name = Topology.parse("h100:4x8"), "xla_gpu_enable_pipelined_all_gather"
    offered = {v: {n for one in trials_for(h100, v) for n in one.options} for v in ("0.10.2", "0.11.2")}
    assert name in offered["0.10.2"]
    assert name not in offered["0.11.2"]
    check_options({name: True}, "0.10.2")
    check_options({"xla_gpu_all_gather_combine_threshold_bytes": 1}, "0.12.0.1")
    with pytest.raises(UserError, match=f"{name} is refused by .* 0.12.0.1, from 0.11 on"):
        check_options({name: True}, "0.12.0.1")
