"""What tracing finds in models nobody annotated."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
import zoo
from meshwright.sharding.errors import UserError
from meshwright.sharding.program import Program, trace


def found(name: str) -> Program:
    case = zoo.MODELS[name]()
    return trace(case.loss, *case.shapes())


def at(program: Program, path: str) -> tuple[tuple[int, ...], ...]:
    """The dims of the argument at `path`."""
    return next(argument.dims for argument in program.arguments if argument.path == path)


def family(program: Program, composition: tuple[int, ...]) -> int:
    return program.dims[composition[0]].family


def test_a_llama_consists_of_its_named_dimensions():
    program = found("decoder")
    layers, embed, heads, query_dim = at(program, "layers/query")
    _, _, kv_heads, value_dim = at(program, "layers/value")
    mlp = at(program, "layers/gate")[2]
    batch, sequence = at(program, "tokens")
    vocab, head = at(program, "embedding")[0], at(program, "head")[1]

    assert heads[0] == kv_heads[0]
    assert len(heads) == 2
    assert at(program, "layers/out") == (layers, heads, value_dim, embed)
    assert at(program, "layers/down") == (layers, mlp, embed)
    assert at(program, "layers/key") == (layers, embed, kv_heads, at(program, "layers/key")[3])
    assert at(program, "norm") == (embed,)
    parts = (layers, embed, heads, query_dim, value_dim, mlp, batch, sequence, vocab, head)
    known = {d for composition in parts for d in composition} | set(at(program, "layers/key")[3])
    # Everything else is a half of a head, from the rotary embedding, and kin to it.
    others = [dim for dim in program.dims if dim.id not in known]
    assert {dim.family for dim in others} <= {family(program, query_dim)}
    assert len({program.dims[d].family for d in known}) == 11


def test_flags_of_a_llama():
    program = found("decoder")
    layers = program.dims[at(program, "layers/query")[0][0]]
    batch, sequence = (program.dims[c[0]] for c in at(program, "tokens"))
    embed = program.dims[at(program, "norm")[0][0]]
    assert (layers.stacked, layers.scanned, layers.name) == (True, True, "layers")
    assert [dim.id for dim in program.dims if dim.stacked] == [layers.id]
    assert batch.batch_like
    assert sequence.batch_like
    assert not embed.batch_like
    assert program.batch_dims == (batch.id,)
    assert embed.contracted
    assert not batch.conflicts
    assert program.unknown == ()


def test_keys_and_queries_meet_in_the_scores():
    program = found("decoder")
    sequence = program.dims[at(program, "tokens")[1][0]]
    assert sequence.conflicts
    assert {conflict.dim for conflict in program.conflicts} == {sequence.id}
    scores = min(sequence.conflicts, key=lambda c: c.equation or 0)
    assert [scores.shape[place] for place in scores.places] == [sequence.size] * 2
    equations = {e.index: e for e in program.equations()}
    dot = next(equations[c.equation] for c in sequence.conflicts if "dot_general" in c.array)
    mine = [factor for factor in dot.factors if sequence.id in factor.dims]
    assert [factor.kind for factor in mine] == ["map", "map"]


def test_a_scanned_layer_is_read_once():
    program = found("decoder")
    (scan,) = [e for e in program.equations() if e.primitive == "scan"]
    assert scan.trips == 2
    dots = [e for e in program.equations() if e.primitive == "dot_general"]
    assert sorted(e.multiplicity for e in dots) == [1] + [2] * 9


def test_merged_heads_split_at_the_reshape():
    program = found("encoder_decoder")
    embed = at(program, "encoder/0/attention/q")[0]
    heads, head_dim = at(program, "encoder/0/attention/q")[1]
    assert program.dims[heads].size == 8
    assert program.dims[head_dim].size == 8
    assert at(program, "encoder/0/attention/o")[0][0] == heads
    assert at(program, "decoder/1/cross/k")[0] == embed
    assert at(program, "embedding")[1] == embed


def test_cross_attention_does_not_confuse_source_and_target():
    program = found("encoder_decoder")
    source = at(program, "source_positions")[0]
    target = at(program, "target_positions")[0]
    assert source != target
    assert at(program, "source")[1] == source
    assert family(program, at(program, "target")[1]) == family(program, target)
    assert at(program, "source")[0] == at(program, "target")[0] == program.batch_dims


def test_patches_are_factors_of_the_image():
    program = found("vision_transformer")
    _, height, width, channels = at(program, "image")
    assert len(height) == len(width) == 2
    assert at(program, "patches")[0] == (height[1], width[1], *channels)


def test_channels_are_one_dimension_along_the_residual():
    program = found("resnet")
    stem = at(program, "stem")[3]
    assert at(program, "blocks/0/conv1")[2] == stem
    assert at(program, "blocks/0/conv2")[3] == stem
    assert at(program, "blocks/1/conv2")[3] == stem
    assert at(program, "blocks/0/norm2/gain") == (stem,)
    assert at(program, "blocks/0/conv1")[3] != stem
    kernel = program.dims[at(program, "stem")[0][0]]
    assert kernel.whole is not None
    assert "conv_general_dilated" in kernel.whole


def test_a_stride_keeps_height_in_the_family():
    program = found("resnet")
    height = program.dims[at(program, "image")[1][0]]
    assert sorted(program.dims[d].size for d in program.families[height.family]) == [8, 16]


def test_gates_of_an_lstm_are_kin_to_the_state():
    program = found("lstm")
    hidden, gates = at(program, "recurrent")
    assert program.dims[gates[0]].size == 4 * program.dims[hidden[0]].size
    assert family(program, gates) == family(program, hidden)
    assert at(program, "input")[1] == at(program, "bias")[0] == gates
    assert at(program, "head")[0] == hidden
    split = next(e for e in program.equations() if e.primitive == "split")
    assert all(dims == (program.batch_dims, hidden) for dims in split.outs)


def test_time_of_an_lstm_is_scanned_but_no_stack_of_layers():
    program = found("lstm")
    (scan,) = [e for e in program.equations() if e.primitive == "scan"]
    time = program.dims[scan.factors[0].dims[0]]
    assert time.scanned
    assert not time.stacked


def test_an_associative_scan_leaves_other_dimensions_alone():
    program = found("state_space")
    inner = at(program, "layers/out")[1]
    assert at(program, "layers/a")[1] == at(program, "layers/b")[1] == inner
    assert at(program, "layers/rate")[1:] == (inner, inner)
    assert program.dims[inner[0]].conflicts[0].array == "layers/rate"
    time = family(program, at(program, "tokens")[1])
    loose = [dim for dim in program.dims if not dim.places and dim.family != time]
    assert loose == []


def test_experts_are_found_by_the_einsum():
    program = found("mixture_of_experts")
    experts, mlp, embed = at(program, "down")
    assert at(program, "up") == (experts, embed, mlp)
    router = program.dims[at(program, "router")[1][0]]
    assert router.whole is None
    top_k = next(e for e in program.equations() if e.primitive == "top_k")
    assert top_k.index in router.whole_at


def test_nodes_are_looked_up_and_edges_are_summed():
    program = found("graph_net")
    nodes, edges = at(program, "nodes")[0][0], at(program, "senders")[0][0]
    scatter = next(e for e in program.equations() if e.primitive == "scatter-add")
    kinds = {factor.dims: factor.kind for factor in scatter.factors}
    assert kinds[(nodes,)] == "index"
    assert kinds[(edges,)] == "contract"


def test_nested_dicts_share_hidden_dimensions():
    program = found("mlp")
    first, second = (f"layers/{n}/linear/weight" for n in (0, 1))
    assert at(program, first)[0] == at(program, second)[1]
    assert at(program, "layers/0/linear/bias")[0] == at(program, first)[0]
    assert at(program, "x") == (program.batch_dims, at(program, first)[1])


def test_skips_of_a_unet_are_kin_to_what_they_join():
    program = found("unet")
    joined = at(program, "up/conv1")[2]
    assert family(program, joined) == family(program, at(program, "grow")[3])
    assert family(program, joined) == family(program, at(program, "shrink")[2])


@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_batch_reaches_the_loss(name: str):
    program = found(name)
    assert program.unknown == ()
    batch = program.dims[program.batch_dims[0]]
    if name != "graph_net":
        assert batch.size in (8, 16)
        assert not batch.conflicts
        assert not batch.whole_at
    assert [result.shape for result in program.results] == [()]


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_dimension_is_the_product_of_its_dims(name: str):
    program = found(name)
    sizes = [dim.size for dim in program.dims]
    scopes = [program.scope] + [scope for e in program.equations() for scope in e.scopes]
    for scope in scopes:
        for var, dims in scope.dims.items():
            products = [math.prod(sizes[d] for d in composition) for composition in dims]
            assert products == list(var.aval.shape)
    assert len({dim.name for dim in program.dims}) == len(program.dims)


def test_a_loop_that_counts_has_known_trips():
    def loss(x, n):
        fixed = jax.lax.while_loop(lambda s: s[0] < 5, lambda s: (s[0] + 1, s[1] * 2), (0, x))[1]
        return jax.lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] * 3), (0, fixed))[1]

    program = trace(loss, jnp.zeros(4), jnp.array(3))
    loops = [e for e in program.equations() if e.primitive == "while"]
    assert [e.trips for e in loops] == [5, None]
    inside = {float(e.eqn.invars[1].val): e for e in program.equations() if e.primitive == "mul"}
    assert (inside[2.0].multiplicity, inside[2.0].counted) == (5, True)
    assert (inside[3.0].multiplicity, inside[3.0].counted) == (1, False)
    assert program.arguments[0].dims == program.results[0].dims


def test_arms_of_a_condition_are_one():
    def loss(w, x):
        return jax.lax.cond(x.sum() > 0, lambda a: a @ w, lambda a: a * 2, x)

    program = trace(loss, jnp.zeros((4, 4)), jnp.zeros((3, 4)))
    w, x = (argument.dims for argument in program.arguments)
    assert w == (x[1], x[1])
    assert program.results[0].dims == x


def test_what_opaque_operations_touch_stays_apart():
    def loss(w, x):
        y = jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct((4, 8), jnp.float32), x @ w)
        return y

    program = trace(loss, jnp.zeros((6, 8)), jnp.zeros((4, 6)))
    callback = next(e for e in program.equations() if e.primitive == "pure_callback")
    assert {factor.kind for factor in callback.factors} == {"whole"}
    assert program.results[0].dims[0] != program.arguments[1].dims[0]
    assert program.unknown == ()


def test_parameters_must_be_arguments():
    with pytest.raises(UserError, match="1 arguments"):
        trace(lambda x: x, jnp.zeros(2), parameters=(1,))
