"""Options of compilers: from data, for the chips that they were seen to help."""

from __future__ import annotations

import pytest
from meshwright.sharding import Topology
from meshwright.sharding.xla.options import (
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
