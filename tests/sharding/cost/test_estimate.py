"""Whole estimates of a small layered network, whose products and bytes can be written down."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from meshwright.sharding import Topology
from meshwright.sharding.cost import Calibration, Candidate, Execution, Pricer
from meshwright.sharding.cost.collectives import links
from meshwright.sharding.cost.compute import FusedAttention
from meshwright.sharding.cost.execution import execution_for
from meshwright.sharding.cost.profile import profile
from meshwright.sharding.ops import attention
from meshwright.sharding.ops.attention import attention_call
from meshwright.sharding.program import trace

LAYERS, BATCH, WIDTH, HIDDEN = 4, 64, 256, 1024
WEIGHTS = LAYERS * 2 * WIDTH * HIDDEN
TOPOLOGY = Topology.parse("h100:8")
CHIP = TOPOLOGY.chip
# Of an all-reduce within a host, for a byte: the switch sums, each device sends all of it and its own eighth.
SUMMED = (1 + 1 / 8) / (0.81 * 450e9)
PERFECT = Calibration()


def loss(params, batch):
    def layer(x, weights):
        return x + jnp.dot(jnp.dot(x, weights["up"]), weights["down"]), None

    x, _ = jax.lax.scan(layer, batch, params)
    return jnp.sum(x.astype(jnp.float32))


@pytest.fixture(scope="module")
def program():
    shape = jax.ShapeDtypeStruct
    params = {
        "down": shape((LAYERS, HIDDEN, WIDTH), jnp.bfloat16),
        "up": shape((LAYERS, WIDTH, HIDDEN), jnp.bfloat16),
    }
    names = {"down": ("layers", "mlp", "embed"), "up": ("layers", "embed", "mlp")}
    return trace(loss, params, shape((BATCH, WIDTH), jnp.bfloat16), names=names)


@pytest.fixture(scope="module")
def pricer(program):
    return Pricer(program, TOPOLOGY, optimizer_slots=8.0, calibration=PERFECT)


def at(program, **named):
    """Return dims by name → axes; the batch is the program's."""
    by_name = {dim.name: dim.id for dim in program.dims} | {"batch": program.batch_dims[0]}
    return {by_name[name]: axes for name, axes in named.items()}


def test_products_take_their_flops_at_the_peak_or_their_bytes(program, pricer):
    found = pricer.price(Candidate(mesh={}, dims={}))
    assert pricer.flops == pytest.approx(6 * BATCH * WEIGHTS)
    moved = 2 * (BATCH * WIDTH + WIDTH * HIDDEN + BATCH * HIDDEN)
    once = max(2 * BATCH * WIDTH * HIDDEN / CHIP.peak_bf16_flops, moved / CHIP.hbm_bytes_per_second)
    assert found.time["compute/matmul"] == pytest.approx(3 * 2 * LAYERS * once)
    assert found.step_seconds == pytest.approx(sum(found.time.values()))
    assert found.peak_bytes == pytest.approx(sum(found.memory.values()))
    assert found.mfu == pytest.approx(pricer.flops / found.step_seconds / CHIP.peak_bf16_flops)


def test_full_remat_saves_inputs_only_and_runs_again_what_gradients_need(program, pricer):
    plain = pricer.price(Candidate(mesh={}, dims={}))
    again = pricer.price(Candidate(mesh={}, dims={}, remat="full"))
    # Three passes of two products, and the first product once more: no gradient needs the second's result.
    assert again.time["compute/matmul"] == pytest.approx(7 / 6 * plain.time["compute/matmul"])
    assert again.memory["saved_activations"] < plain.memory["saved_activations"]
    assert again.memory["saved_activations"] >= LAYERS * BATCH * WIDTH * 2


def test_named_values_are_kept_where_they_are_named_to_be(program, pricer):
    full = pricer.price(Candidate(mesh={}, dims={}, remat="full"))
    plain = pricer.price(Candidate(mesh={}, dims={}))
    kept = pricer.price(Candidate(mesh={}, dims={}, remat="names", saved={"up": "device"}))
    away = pricer.price(Candidate(mesh={}, dims={}, remat="names", saved={"up": "host"}))
    size = LAYERS * BATCH * HIDDEN * 2
    for found in (kept, away):
        assert found.time["compute/matmul"] == pytest.approx(plain.time["compute/matmul"])
    before = full.memory["saved_activations"]
    assert kept.memory["saved_activations"] == pytest.approx(before + size)
    assert away.memory["saved_activations"] == pytest.approx(before)
    assert away.time["offload/host"] >= 2 * size / CHIP.host_link_bytes_per_second_per_chip


def test_a_transfer_is_waited_for_where_the_schedule_leaves_less_beside_it_than_the_link_takes(program):
    away = Candidate(mesh={}, dims={}, remat="names", saved={"up": "host"})
    link = CHIP.host_link_bytes_per_second_per_chip
    hides = dataclasses.replace(PERFECT, overlap_host=1e6)

    def waited(rate):
        execution = Execution(host_rate=rate)
        found = Pricer(program, TOPOLOGY, calibration=hides, execution=execution).price(away)
        return found.time["offload/host"]

    size = LAYERS * BATCH * HIDDEN * 2
    free = waited(None)
    product = Pricer(program, TOPOLOGY, calibration=PERFECT).price(Candidate(mesh={}, dims={})).time
    product = product["compute/matmul"] / (3 * 2 * LAYERS)
    # A transfer at an infinite rate still has one product beside it; the rest of it is waited for.
    assert waited(1e30) - free == pytest.approx(2 * (size / link - LAYERS * product))
    assert waited(link) == pytest.approx(free)
    assert free < waited(3 * link) <= waited(1e30)


def test_data_parallelism_reduces_all_gradients_once_a_step(program, pricer):
    found = pricer.price(Candidate(mesh={"data": 8}, dims=at(program, batch=("data",)), microbatches=4))
    assert found.time["all_reduce/data"] == pytest.approx(2 * WEIGHTS * SUMMED)
    assert not any(name.startswith("all_gather") for name in found.time)


def stored_over(axis):
    return dict.fromkeys(range(2), ((), (axis,), ()))


def test_fsdp_gathers_twice_and_scatters_once_a_microbatch(program, pricer):
    candidate = Candidate(
        mesh={"fsdp": 8}, dims=at(program, batch=("fsdp",)), stored=stored_over("fsdp"), microbatches=2
    )
    found = pricer.price(candidate)
    once = 7 / 8 * 2 * WEIGHTS / 450e9
    assert found.time["all_gather/fsdp"] == pytest.approx(2 * 2 * once)
    assert found.time["reduce_scatter/fsdp"] == pytest.approx(2 * once)
    # A microbatch's gradients lie beside their sum.
    for item, size in (("params", 2), ("gradients", 2 * 2), ("optimizer", 8)):
        assert found.memory[item] == pytest.approx(size * WEIGHTS / 8)


def test_what_is_partial_over_two_axes_may_be_reduced_whole(program):
    """Over all axes, not scattered; new parameters are gathered over those that only moments lie over.

    Several microbatches scatter what they learn by hand.
    """
    both = dict.fromkeys(range(2), ((), ("fsdp", "data"), ()))
    candidate = Candidate(
        mesh={"data": 2, "fsdp": 4},
        dims=at(program, batch=("data", "fsdp")),
        stored=stored_over("fsdp"),
        gradients=both,
        optimizer=both,
    )
    pricers = [
        Pricer(
            program,
            TOPOLOGY,
            optimizer_slots=8.0,
            calibration=PERFECT,
            execution=Execution(reduces_whole=whole),
        )
        for whole in (False, True)
    ]
    scattered, whole = (pricer.price(candidate).time for pricer in pricers)
    once = 2 * WEIGHTS / 450e9
    assert scattered["reduce_scatter/fsdp"] == pytest.approx(3 / 4 * once)
    assert not any(name.startswith("all_reduce") for name in scattered)
    # One collective of all eight devices, said of the first axis.
    eight = links({"fsdp": 8}, TOPOLOGY, PERFECT)["fsdp"]
    assert whole["all_reduce/data"] == pytest.approx(eight.collective("all_reduce", 2 * WEIGHTS))
    assert "all_reduce/fsdp" not in whole
    assert not any(name.startswith("reduce_scatter") for name in whole)
    assert whole["all_gather/data"] == pytest.approx(1 / 2 * once / 4)
    parts = dataclasses.replace(candidate, microbatches=2)
    assert pricers[0].price(parts).time == pricers[1].price(parts).time


def test_nothing_hides_what_a_compiler_scatters_at_a_layer_s_end(program):
    candidate = Candidate(
        mesh={"fsdp": 8},
        dims=at(program, batch=("fsdp",)),
        **dict.fromkeys(("stored", "gradients", "optimizer"), stored_over("fsdp")),
    )
    hiding = dataclasses.replace(PERFECT, overlap_parameters=1e6)
    shown = [
        Pricer(program, TOPOLOGY, calibration=hiding, execution=Execution(scatters_wait=share))
        .price(candidate)
        .time.get("reduce_scatter/fsdp", 0.0)
        for share in (0.0, 0.4, 1.0)
    ]
    assert shown == pytest.approx([0.0, 0.4 * shown[2], 7 / 8 * 2 * WEIGHTS / 450e9])


def test_what_a_tpus_compiler_gathers_and_reduces_by_itself_is_waited_for_within_a_slice(program):
    def spent(topology, axis, **stored):
        kept = dict.fromkeys(("stored", "gradients", "optimizer"), stored_over(axis)) | stored
        candidate = Candidate(mesh={axis: 8}, dims=at(program, batch=(axis,)), **kept)
        # All of it would be hidden.
        free = Calibration(overlap_parameters=1e9, overlap_gradients=1e9, overlap_shards=1e9)
        time = Pricer(program, Topology.parse(topology), calibration=free).price(candidate).time
        return [time.get(f"{kind}/{axis}", 0.0) for kind in ("all_gather", "reduce_scatter")]

    for topology in ("v5p:2x2x2", "v6e:2x4"):
        way = links({"fsdp": 8}, Topology.parse(topology), PERFECT)["fsdp"]
        gathered, scattered = (
            way.collective(kind, 2.0 * WEIGHTS) for kind in ("all_gather", "reduce_scatter")
        )
        assert spent(topology, "fsdp") == pytest.approx([2.0 * gathered, scattered])
        # Parameters that lie whole are gathered once a step, after the optimizer's.
        assert spent(topology, "data", stored={})[0] == pytest.approx(gathered)
    # v5e gathers within products, and slices talk beside them.
    assert spent("v5e:2x4", "fsdp") == spent("2*v5p:2x2x1", "fsdp") == [0.0, 0.0]


def test_zero_stages_share_out_one_item_after_the_other(program, pricer):
    whole = Candidate(mesh={"data": 8}, dims=at(program, batch=("data",)))
    one = dataclasses.replace(whole, optimizer=stored_over("data"))
    two = dataclasses.replace(one, gradients=stored_over("data"))
    items = [pricer.price(candidate).memory for candidate in (whole, one, two)]
    assert [m["optimizer"] for m in items] == pytest.approx([8 * WEIGHTS, WEIGHTS, WEIGHTS])
    assert [m["gradients"] for m in items] == pytest.approx([2 * WEIGHTS, 2 * WEIGHTS, WEIGHTS / 4])
    assert {m["params"] for m in items} == {2.0 * WEIGHTS}


def test_a_sharded_contraction_is_reduced_forward_and_its_operand_backward(program, pricer):
    found = pricer.price(Candidate(mesh={"tensor": 8}, dims=at(program, mlp=("tensor",))))
    each = BATCH * WIDTH * 2 * SUMMED
    assert found.time["all_reduce/tensor"] == pytest.approx(LAYERS * 2 * each)
    assert found.memory["params"] == pytest.approx(2 * WEIGHTS / 8)


def test_activations_sharded_over_the_same_axis_turn_all_reduces_into_halves(program, pricer):
    candidate = Candidate(mesh={"tensor": 8}, dims=at(program, mlp=("tensor",), batch=("tensor",)))
    found = pricer.price(candidate)
    assert "all_reduce/tensor" not in found.time
    # Gathered for the forward pass, for the gradient of the weights, and as the gradient of a scatter.
    assert found.time["all_gather/tensor"] == pytest.approx(1.5 * found.time["reduce_scatter/tensor"])


def test_stages_share_the_layers_and_wait_in_a_bubble(program, pricer):
    deep = Candidate(mesh={"stage": 4}, dims=at(program, layers=("stage",)), microbatches=8)
    found = pricer.price(deep)
    assert found.memory["params"] == pytest.approx(2 * WEIGHTS / 4)
    busy = sum(found.time[name] for name in ("compute/matmul", "compute/elementwise", "send/stage"))
    assert found.time["bubble"] == pytest.approx(3 / 8 * busy, rel=0.1)


def test_more_microbatches_save_less_and_overlap_hides_gathers(program):
    hidden = Pricer(program, TOPOLOGY, calibration=Calibration(overlap_parameters=1e6))
    candidate = Candidate(mesh={"fsdp": 8}, dims=at(program, batch=("fsdp",)), stored=stored_over("fsdp"))
    found = hidden.price(candidate)
    assert found.time.get("all_gather/fsdp", 0.0) == 0.0
    less = hidden.price(dataclasses.replace(candidate, microbatches=4))
    assert less.memory["saved_activations"] < found.memory["saved_activations"]


def test_an_indivisible_dim_is_padded(program, pricer):
    thirds = Pricer(program, Topology.parse("h100:3"), calibration=PERFECT)
    found = thirds.price(Candidate(mesh={"data": 3}, dims=at(program, batch=("data",))))
    whole = thirds.price(Candidate(mesh={}, dims={}))
    assert found.time["compute/elementwise"] == pytest.approx(
        22 / 64 * whole.time["compute/elementwise"], rel=0.05
    )


def test_the_peak_alone_is_what_the_price_says(program, pricer):
    dims = at(program, batch=("data",), mlp=("tensor",))
    for remat in ("none", "full"):
        candidate = Candidate(mesh={"data": 2, "tensor": 4}, dims=dims, remat=remat, microbatches=2)
        assert pricer.needed_bytes(candidate) == pytest.approx(pricer.price(candidate).needed_bytes)


def test_an_optimizers_shares_hide_apart_from_whole_gradients(program):
    dims = at(program, batch=("data",))
    index = {a.path: a.index for a in program.parameters}
    shared = {index[path]: (("data",), (), ()) for path in index}
    whole = Candidate(mesh={"data": 8}, dims=dims)
    shares = Candidate(mesh={"data": 8}, dims=dims, optimizer=shared)

    def moved(candidate, **overlaps):
        calibration = dataclasses.replace(PERFECT, **overlaps)
        time = Pricer(program, TOPOLOGY, calibration=calibration).price(candidate).time
        return sum(seconds for name, seconds in time.items() if name.endswith("/data"))

    assert moved(whole, overlap_gradients=0.5) < moved(whole)
    assert moved(whole, overlap_shards=0.5) == pytest.approx(moved(whole))
    assert moved(shares, overlap_shards=0.5) < moved(shares)
    assert moved(shares, overlap_gradients=0.5) == pytest.approx(moved(shares))


def test_products_that_matrix_units_cannot_read_whole_are_slower():
    def product(params, batch):
        return jnp.sum(jnp.dot(batch, params).astype(jnp.float32))

    def seconds(width, efficiency):
        shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((4096, width), (4096, 4096))]
        calibration = dataclasses.replace(PERFECT, unaligned_efficiency=efficiency)
        pricer = Pricer(trace(product, *shapes), TOPOLOGY, calibration=calibration)
        return pricer.price(Candidate(mesh={}, dims={})).time["compute/matmul"]

    assert seconds(4104, 0.1) == pytest.approx(seconds(4104, 1.0))
    assert seconds(4100, 0.1) == pytest.approx(10 * seconds(4100, 1.0))


def test_places_that_stay_free_are_needed_but_not_in_the_peak(program):
    calibration = dataclasses.replace(PERFECT, fragmentation=0.5)
    candidate = Candidate(mesh={"fsdp": 8}, dims=at(program, batch=("fsdp",)), stored=stored_over("fsdp"))
    plain = Pricer(program, TOPOLOGY, calibration=PERFECT).price(candidate)
    found = Pricer(program, TOPOLOGY, calibration=calibration).price(candidate)
    assert (found.peak_bytes, plain.needed_bytes) == (plain.peak_bytes, plain.peak_bytes)
    passing = found.memory["temporaries"] + found.memory["communication"]
    assert found.needed_bytes == pytest.approx(found.peak_bytes + passing / 2)


def test_rows_of_heads_that_are_kept_fill_whole_tiles():
    def loss(params, batch):
        def layer(x, w):
            heads = jax.nn.sigmoid((x @ w).reshape(4, 32, 2, 64))
            return jnp.sin(heads).reshape(4, 32, 128), None

        return jnp.sum(jax.lax.scan(layer, batch, params)[0])

    shape = jax.ShapeDtypeStruct
    program = trace(loss, shape((LAYERS, 128, 128), jnp.bfloat16), shape((4, 32, 128), jnp.bfloat16))
    kept = [
        Pricer(program, Topology.parse(where), calibration=PERFECT)
        .price(Candidate(mesh={}, dims={}))
        .memory["saved_activations"]
        for where in ("v5e:1x1", "h100:1")
    ]
    # A tile's row has 128 elements, a head's 64: half of what a sigmoid gives, and of its factor, is empty.
    assert kept[0] - kept[1] == pytest.approx(2 * LAYERS * 4 * 32 * 128 * 2)


def test_a_convolution_of_each_channel_by_itself_costs_what_vector_units_take():
    """A channel has one column: matrix units would be filled to a part in thousands."""
    rows, channels, taps = 65536, 4096, 256

    def convolved(kernel, signal):
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(
            signal, kernel, (1,), "SAME", dimension_numbers=numbers, feature_group_count=channels
        ).sum()

    kernel = jax.ShapeDtypeStruct((taps, 1, channels), jnp.float32)
    program = trace(convolved, kernel, jax.ShapeDtypeStruct((1, rows, channels), jnp.float32))
    ramped = Calibration(matmul_half_size=64)
    pricer = Pricer(program, TOPOLOGY, calibration=ramped, dtype="float32")
    seconds = pricer.price(Candidate(mesh={}, dims={})).time["compute/matmul"]
    assert seconds == pytest.approx(pricer.flops / CHIP.vector_f32_flops)


def attending(keys, width, *, masked=0.0, **efficiencies):
    """Return seconds of one kernel's forward and backward pass, all that is computed the same."""
    query = jax.ShapeDtypeStruct((2**22 // (keys * width), keys, 8, width), jnp.bfloat16)
    program = trace(
        lambda w, x: attention(x * w, x * w, x * w).sum(), jax.ShapeDtypeStruct((), jnp.bfloat16), query
    )
    kernel = FusedAttention(share=1.0, gradient=2.5, masked=masked)
    calls = frozenset(e.index for e in program.equations() if attention_call(e.eqn))
    pricer = Pricer(
        profile(program, kernels=calls),
        TOPOLOGY,
        calibration=Calibration(**efficiencies),
        execution=execution_for(TOPOLOGY, kernel),
    )
    return pricer.price(Candidate(mesh={}, dims={})).time["compute/attention"]


def test_attention_is_slower_with_narrow_heads_few_keys_and_a_mask():
    plain = attending(1024, 64)
    assert attending(1024, 64, attention_half_width=64) == pytest.approx(2.0 * plain)
    assert attending(1024, 64, attention_half_keys=1024) == pytest.approx(2.0 * plain)
    masked = attending(1024, 64, masked=1.0, masked_efficiency=0.5)
    assert masked == pytest.approx(2.0 * plain)
    assert attending(1024, 64, masked=0.0, masked_efficiency=0.5) == pytest.approx(plain)


def test_keeping_costs_what_the_stacks_of_layers_move_and_recomputing_wins_where_that_is_more(program):
    calibration = dataclasses.replace(PERFECT, kept_passes=3.0)
    pricer = Pricer(program, TOPOLOGY, calibration=calibration)
    everything = pricer.price(Candidate(mesh={}, dims={}, remat="none"))
    little = pricer.price(Candidate(mesh={}, dims={}, remat="full"))
    moved = 3.0 * LAYERS * BATCH * (WIDTH + HIDDEN) * 2
    assert everything.time["kept"] == pytest.approx(moved / CHIP.hbm_bytes_per_second)
    assert little.time["kept"] == pytest.approx(3.0 * LAYERS * BATCH * WIDTH * 2 / CHIP.hbm_bytes_per_second)
    assert (
        "kept" not in Pricer(program, TOPOLOGY, calibration=PERFECT).price(Candidate(mesh={}, dims={})).time
    )
