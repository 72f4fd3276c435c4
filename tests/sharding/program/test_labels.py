"""Labels name dims and decide nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import zoo
from flax import linen as nn
from flax import nnx
from meshwright.sharding.errors import UserError
from meshwright.sharding.program import trace

NAMES = {
    "embedding": ("vocab", "embed"),
    "layers": {
        "query": ("layers", "embed", "heads", "head_dim"),
        "key": ("layers", "embed", "kv_heads", "head_dim"),
        "value": ("layers", "embed", "kv_heads", "head_dim"),
        "gate": ("layers", "embed", "mlp"),
    },
    "head": (None, "vocab"),
}


def decoder(names):
    case = zoo.decoder()
    return trace(case.loss, *case.shapes(), names=names)


def by_name(program):
    return {dim.name: dim for dim in program.dims}


def test_labels_name_dims_wherever_they_stand():
    program = decoder(NAMES)
    down = next(a for a in program.arguments if a.path == "layers/down")
    assert [program.dims[d].name for (d,) in down.dims] == ["layers", "mlp", "embed"]


def test_one_label_on_two_dims_keeps_both():
    program = decoder(NAMES)
    assert {"vocab", "vocab.1"} <= set(by_name(program))
    assert program.labelled("vocab") == ((by_name(program)["vocab"].id,), (by_name(program)["vocab.1"].id,))


def test_heads_are_kv_heads_and_their_queries():
    program = decoder(NAMES)
    kv, rest = by_name(program)["kv_heads"], by_name(program)["heads"]
    assert (kv.size, rest.size) == (8, 2)
    assert program.labelled("heads") == ((kv.id, rest.id),)
    assert program.labelled("kv_heads") == ((kv.id,),)


def test_labels_decide_nothing():
    plain, named = decoder(None), decoder({"embedding": ("same", "same"), "head": ("same", "same")})
    assert [a.dims for a in plain.arguments] == [a.dims for a in named.arguments]


def test_names_of_the_data_go_by_position():
    case = zoo.decoder()
    names = {0: NAMES, 1: {"tokens": ("batch", "sequence")}}
    program = trace(case.loss, *case.shapes(), names=names)
    assert by_name(program)["sequence"].size == 24


def test_flax_metadata_is_read():
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            make = nnx.initializers.lecun_normal()
            kernel = nnx.with_partitioning(make, ("embed", "mlp"), eager_sharding=False)
            self.up = nnx.Linear(8, 16, rngs=rngs, kernel_init=kernel)

    graph, state = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))

    def loss(state, x):
        return jnp.sum(nnx.merge(graph, state).up(x))

    program = trace(loss, state, jax.ShapeDtypeStruct((4, 8), jnp.float32))
    assert {dim.name: dim.size for dim in program.dims} == {"mlp": 16, "embed": 8, "batch": 4}


def test_flax_metadata_of_fewer_names_than_dimensions_leaves_the_last_without():
    kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "kv"))
    heads = nn.DenseGeneral(features=(2, 4), kernel_init=kernel, use_bias=False)
    x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    params = jax.eval_shape(heads.init, jax.random.key(0), x)
    program = trace(lambda params, x: jnp.sum(heads.apply(params, x)), params, x)
    assert program.arguments[0].names == ("embed", "kv", None)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"embedding": ("vocab",)}, r"\[64, 32\] but has 1 dimension names: \['vocab'\]"),
        ({"embeding": ("vocab", "embed")}, "did you mean 'embedding'"),
        ({"embedding": "vocab"}, "not a tuple"),
        ({7: {"tokens": ("batch", None)}}, "argument 7, but there are 2"),
    ],
)
def test_names_that_do_not_fit_are_refused(names, message):
    with pytest.raises(UserError, match=message):
        decoder(names)
