"""Tokens that are sorted by their expert, worked on in that order and put back, under microbatches."""

from __future__ import annotations

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from meshwright.sharding import UserError, declare

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

EXPERTS, CHOSEN, WIDTH, HIDDEN, ROWS, TIME = 4, 2, 8, 12, 16, 3
TOKENS = ROWS * TIME


def arguments():
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = {
        "table": (32, WIDTH),
        "router": (WIDTH, EXPERTS),
        "up": (EXPERTS, WIDTH, HIDDEN),
        "down": (EXPERTS, HIDDEN, WIDTH),
    }
    params = {name: draws.normal(key, sizes[name]) / 2 for name, key in zip(sizes, keys, strict=True)}
    return params, {"tokens": np.random.default_rng(0).integers(0, 32, (ROWS, TIME)).astype(np.int32)}


def routed(p, x):
    gates, experts = lax.top_k(jax.nn.softmax(x @ p["router"]), CHOSEN)
    return gates, experts, jnp.argsort(experts.reshape(-1))


def worked(p, x, sizes, act=jax.nn.silu):
    return lax.ragged_dot(act(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)


def put_back(y, order, gates):
    return (y[jnp.argsort(order)].reshape(-1, CHOSEN, WIDTH) * gates[..., None]).sum(1)


def unsorted(p, x):
    gates, experts, order = routed(p, x)
    y = worked(p, x[order // CHOSEN], jnp.bincount(experts.reshape(-1), length=EXPERTS))
    return put_back(y, order, gates)


def added(p, x):
    gates, experts, order = routed(p, x)
    y = worked(p, x[order // CHOSEN], (experts[..., None] == jnp.arange(EXPERTS)).sum((0, 1)))
    return jnp.zeros_like(x).at[order // CHOSEN].add(y * gates.reshape(-1)[order][:, None])


def by_keys(p, x):
    gates, experts, _ = routed(p, x)
    number = jnp.arange(TOKENS * CHOSEN) // CHOSEN
    own, token, gate = lax.sort((experts.reshape(-1), number, gates.reshape(-1)), num_keys=1)
    y = worked(p, x[token], jax.nn.one_hot(own, EXPERTS).sum(0).astype(jnp.int32)) * gate[:, None]
    return jnp.zeros_like(x).at[token].add(y)


def one_expert(p, x):
    """One expert of each token, weights looked up, an inverse order written, and its mean with all."""
    expert = jnp.argmax(x @ p["router"], -1)
    order = jnp.argsort(expert)
    back = jnp.zeros(TOKENS, jnp.int32).at[order].set(jnp.arange(TOKENS))
    h = jax.nn.relu(jnp.einsum("td,tdh->th", x[order], p["up"][expert[order]]))
    y = lax.ragged_dot(h, p["down"], jnp.zeros(EXPERTS, jnp.int32).at[expert].add(1))
    return y[back] + y.mean(0)


def in_turn(p, x):
    """Choices of all tokens one after another: the tokens stand several times, not side by side."""
    gates, experts, _ = routed(p, x)
    order = jnp.argsort(experts.T.reshape(-1))
    y = worked(p, x[order % TOKENS], jnp.bincount(experts.T.reshape(-1), length=EXPERTS))
    return (y[jnp.argsort(order)].reshape(CHOSEN, -1, WIDTH) * gates.T[..., None]).sum(0)


def padded(p, x):
    """Tokens that are padding go to no expert, behind all others."""
    gates, experts, _ = routed(p, x)
    own = jnp.where(jnp.repeat(x[:, 0] > 0, CHOSEN), experts.reshape(-1), EXPERTS)
    order = jnp.argsort(own)
    y = worked(p, x[order // CHOSEN], jnp.bincount(own, length=EXPERTS + 1)[:EXPERTS])
    return put_back(y, order, gates)


def by_two_keys(p, x):
    """Sorted by expert and then by place, counted as they are sorted."""
    gates, experts, _ = routed(p, x)
    own, order = lax.sort((experts.reshape(-1), jnp.arange(TOKENS * CHOSEN)), num_keys=2)
    del own
    sizes = jnp.bincount(experts.reshape(-1)[order], length=EXPERTS)
    return put_back(worked(p, x[order // CHOSEN], sizes), order, gates)


def packed(p, x):
    """Expert and place in one number, sizes cut out of cumulated ones."""
    gates, experts, _ = routed(p, x)
    own, count = experts.reshape(-1), TOKENS * CHOSEN
    order = jnp.argsort(own * count + jnp.arange(count), stable=False)
    ends = jnp.cumsum(jnp.bincount(own, length=EXPERTS))
    sizes = jnp.diff(jnp.concatenate([jnp.zeros(1, ends.dtype), ends]))
    return put_back(worked(p, x[order // CHOSEN], sizes), order, gates)


def downwards(p, x):
    """The last expert first, by two ways to count down."""
    gates, experts, _ = routed(p, x)
    own, reverse = experts.reshape(-1), {name: leaf[::-1] for name, leaf in p.items()}
    order, sizes = jnp.argsort(-own), jnp.bincount(own, length=EXPERTS)[::-1]
    one = put_back(worked(reverse, x[order // CHOSEN], sizes), order, gates)
    own = EXPERTS - 1 - own
    order = jnp.argsort(own)
    sizes = jnp.bincount(own, length=EXPERTS)
    return one + 2 * put_back(worked(reverse, x[order // CHOSEN], sizes, jnp.tanh), order, gates)


def from_one(p, x):
    """Experts counted from 1, of which 0 is none; two of them have one matrix in the second product."""
    gates, experts, _ = routed(p, x)
    own = experts.reshape(-1) + 1
    order = jnp.argsort(own)
    sizes = jnp.bincount(own, length=EXPERTS + 1)[1:]
    one = worked(p, x[order // CHOSEN], sizes)
    halves = ((own // 2)[:, None] == jnp.arange(EXPERTS)).sum(0)
    gate, up = jnp.split(lax.ragged_dot(one, p["up"], halves), 2, axis=-1)
    wide = jnp.tanh(gate * up) @ p["down"][0, : HIDDEN // 2]
    return put_back(one + wide, order, gates)


def searched(p, x):
    """Sizes cut out of how many of the sorted experts are at most each."""
    gates, experts, order = routed(p, x)
    own = experts.reshape(-1)[order]
    ends = jnp.searchsorted(own, jnp.arange(EXPERTS), side="right", method="compare_all")
    return put_back(worked(p, x[order // CHOSEN], jnp.diff(ends, prepend=0)), order, gates)


def loss_of(mixture, layers=0):
    def loss(p, b):
        def layer(x, _=None):
            return jnp.tanh(x + mixture(p, x.reshape(-1, WIDTH)).reshape(x.shape)), None

        x = p["table"][b["tokens"]]
        x = lax.scan(jax.checkpoint(layer), x, None, length=layers)[0] if layers else layer(x)[0]
        return (x**2).mean()

    return loss


@pytest.mark.parametrize(
    ("mixture", "layers", "mesh"),
    [
        (unsorted, 2, {"data": 2}),
        (added, 0, {"fsdp": 2}),
        pytest.param(by_keys, 0, {"data": 1}, marks=pytest.mark.slow),
        (one_expert, 0, {"data": 1}),
        (padded, 0, {"data": 1}),
        pytest.param(in_turn, 0, {"data": 1}, marks=pytest.mark.slow),
        (by_two_keys, 2, {"data": 2}),
        (packed, 0, {"data": 1}),
        (downwards, 0, {"data": 1}),
        (from_one, 0, {"data": 1}),
        (searched, 0, {"data": 1}),
    ],
    ids=lambda one: getattr(one, "__name__", str(one)),
)
def test_tokens_sorted_by_their_expert_keep_values_and_gradients(mixture, layers, mesh):
    (params, batch), loss = arguments(), loss_of(mixture, layers)
    count = int(np.prod(list(mesh.values())))
    plan = declare(loss, params, batch, topology=f"cpu:{count}", mesh=mesh, microbatches=4)
    devices = plan.make_mesh(devices=jax.devices()[:count])
    found = jax.jit(jax.value_and_grad(plan.apply(loss, mesh=devices)))(params, batch)
    wanted = jax.jit(jax.value_and_grad(loss))(params, batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)


def told_by(route, counts=None):
    """Experts of tokens that are told by the tokens themselves, without a router."""

    def loss(p, b):
        tokens = b["tokens"].reshape(-1)
        x, own = p["table"][tokens], route(tokens)
        order = jnp.argsort(own)
        sizes = jnp.bincount(own if counts is None else counts(tokens), length=EXPERTS)
        return (jnp.tanh(x + worked(p, x[order], sizes)[jnp.argsort(order)]) ** 2).mean()

    return loss


def by_rest(tokens):
    return tokens % EXPERTS


def by_hash(tokens):
    return (((tokens.astype(jnp.uint32) * jnp.uint32(2654435761)) >> 16) % EXPERTS).astype(jnp.int32)


def by_table(tokens):
    return jnp.asarray(np.random.default_rng(1).permutation(32) % EXPERTS)[tokens]


@pytest.mark.parametrize("route", [by_rest, by_hash, by_table])
def test_tokens_that_tell_their_expert_themselves_are_sorted_by_it(route):
    params, batch = arguments()
    loss = told_by(route)
    plan = declare(loss, params, batch, topology="cpu:2", mesh={"data": 2}, microbatches=4)
    devices = plan.make_mesh(devices=jax.devices()[:2])
    found = jax.jit(jax.value_and_grad(plan.apply(loss, mesh=devices)))(params, batch)
    wanted = jax.jit(jax.value_and_grad(loss))(params, batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("route", "counts"),
    [(lambda tokens: tokens, by_rest), (by_rest, by_hash), (lambda tokens: tokens % EXPERTS - 1, None)],
    ids=["unbounded", "of another", "below zero"],
)
def test_groups_of_other_numbers_than_tokens_are_sorted_by_are_refused(route, counts):
    params, batch = arguments()

    def other(tokens):
        return route(tokens) if counts is None else counts(tokens)

    loss = told_by(route, lambda tokens: jnp.where(other(tokens) < 0, EXPERTS, other(tokens)))
    with pytest.raises(UserError, match="would change the result"):
        declare(loss, params, batch, topology="cpu:1", mesh={"data": 1}, microbatches=4)


def in_places(p, x):
    """What has no place among the first of its expert is dropped: that depends on all other tokens."""
    gates, experts, order = routed(p, x)
    own, sizes = experts.reshape(-1), jnp.bincount(experts.reshape(-1), length=EXPERTS)
    place = jnp.arange(TOKENS * CHOSEN) - (jnp.cumsum(sizes) - sizes)[own[order]]
    return put_back(x[order // CHOSEN] * (place < 5)[:, None], order, gates)


def ranked(p, x):
    _gates, experts, order = routed(p, x)
    own, sizes = experts.reshape(-1), jnp.bincount(experts.reshape(-1), length=EXPERTS)
    rank = jnp.argsort(order) - (jnp.cumsum(sizes) - sizes)[own]
    return ((rank < 5)[:, None] * jnp.repeat(x, CHOSEN, 0)).reshape(-1, CHOSEN, WIDTH).sum(1)


def held(p, x):
    gates, experts, order = routed(p, x)
    sizes = jnp.minimum(jnp.bincount(experts.reshape(-1), length=EXPERTS), 5)
    return put_back(worked(p, x[order // CHOSEN], sizes), order, gates)


def backwards(p, x):
    gates, experts, _ = routed(p, x)
    own = experts.reshape(-1)
    order = jnp.argsort(-own)
    return put_back(worked(p, x[order // CHOSEN], jnp.bincount(own, length=EXPERTS)), order, gates)


def in_pairs(p, x):
    """Sorted by what two experts have in common, of which each lies in any order beside the other."""
    gates, experts, _ = routed(p, x)
    own = experts.reshape(-1)
    order = jnp.argsort(own // 2)
    return put_back(worked(p, x[order // CHOSEN], jnp.bincount(own, length=EXPERTS)), order, gates)


def packed_too_tight(p, x):
    gates, experts, _ = routed(p, x)
    own, count = experts.reshape(-1), TOKENS * CHOSEN
    order = jnp.argsort(own * (count - 1) + jnp.arange(count))
    return put_back(worked(p, x[order // CHOSEN], jnp.bincount(own, length=EXPERTS)), order, gates)


def packed_beyond_its_type(p, x):
    gates, experts, _ = routed(p, x)
    own, count = experts.reshape(-1), TOKENS * CHOSEN
    order = jnp.argsort(own * (1 << 30) + jnp.arange(count))
    return put_back(worked(p, x[order // CHOSEN], jnp.bincount(own, length=EXPERTS)), order, gates)


def counted_twice(p, x):
    gates, experts, order = routed(p, x)
    own = jnp.concatenate([experts, experts], 1).reshape(-1)
    sizes = (own[:, None] == jnp.arange(EXPERTS)).sum(0)
    return put_back(worked(p, x[order // CHOSEN], sizes), order, gates)


def one_more(p, x):
    gates, experts, order = routed(p, x)
    sizes = jnp.bincount(experts.reshape(-1), length=EXPERTS) + jnp.array([1, 0, 0, -1])
    return put_back(worked(p, x[order // CHOSEN], sizes), order, gates)


def of_others(p, x):
    gates, _, order = routed(p, x)
    sizes = CHOSEN * jnp.bincount(jnp.argmax(x @ p["router"], -1), length=EXPERTS)
    return put_back(worked(p, x[order // CHOSEN], sizes), order, gates)


def below_zero(p, x):
    """The expert -1 is the last one where it is counted, and the first where it is sorted."""
    expert = jnp.argmax(x @ p["router"], -1) - 1
    order = jnp.argsort(expert)
    sizes = jnp.zeros(EXPERTS, jnp.int32).at[expert].add(1)
    return worked(p, x[order], sizes)[jnp.argsort(order)]


def padded_before(p, x):
    """Padding goes before all others, and is counted with none."""
    gates, experts, _ = routed(p, x)
    own = jnp.where(jnp.repeat(x[:, 0] > 0, CHOSEN), experts.reshape(-1), -1)
    order = jnp.argsort(own)
    return put_back(worked(p, x[order // CHOSEN], (own[:, None] == jnp.arange(EXPERTS)).sum(0)), order, gates)


def but_the_first(p, x):
    gates, experts, order = routed(p, x)
    sizes = jnp.bincount(experts.reshape(-1), length=EXPERTS + 1)[1:]
    return put_back(worked(p, x[order // CHOSEN], sizes), order, gates)


def of_neighbours(p, x):
    gates, _, order = routed(p, x)
    return put_back(jnp.cumsum(x[order // CHOSEN], 0), order, gates)


def of_the_next(p, x):
    _, _, order = routed(p, x)
    return x[(order // CHOSEN + 1) % TOKENS][jnp.argsort(order)].reshape(-1, CHOSEN, WIDTH).sum(1)


def in_another_order(p, x):
    gates, _, order = routed(p, x)
    return put_back(x[order // CHOSEN], jnp.argsort(jnp.repeat(x.sum(-1), CHOSEN)), gates)


def the_first_of_all(p, x):
    gates, _, order = routed(p, x)
    return put_back(jnp.tile(x[order // CHOSEN][:TOKENS], (CHOSEN, 1)), order, gates)


def in_twos(p, x):
    gates, _, order = routed(p, x)
    pairs = x[order // CHOSEN].reshape(-1, CHOSEN, WIDTH)
    return put_back((pairs - pairs.mean(1, keepdims=True)).reshape(-1, WIDTH), order, gates)


@pytest.mark.parametrize(
    ("mixture", "layers", "said"),
    [
        (in_places, 0, r"what lies by their place among all, at .*\(in_places\)"),
        (in_places, 2, r"at .*test_arranged.py:\d+ \(in_places\)"),
        (ranked, 0, r"the place that a sort gives an example among all is computed with, at .*\(ranked\)"),
        (held, 0, "not counts of what the examples are sorted by"),
        (backwards, 0, "not counts of what"),
        (in_pairs, 0, "not counts of what"),
        (packed_too_tight, 0, "not counts of what"),
        (packed_beyond_its_type, 0, "not counts of what"),
        (counted_twice, 0, "not counts of what"),
        (one_more, 0, "not counts of what"),
        (of_others, 0, "not counts of what"),
        (below_zero, 0, "not counts of what"),
        (padded_before, 0, "not counts of what"),
        (but_the_first, 0, "not counts of what"),
        (of_neighbours, 0, "cumsum of examples that a sort has moved"),
        (of_the_next, 0, "examples are looked up at computed places"),
        (in_another_order, 0, "the place that a sort gives"),
        (the_first_of_all, 0, "some of the examples that a sort has moved are cut out"),
        (in_twos, 0, "a reshape groups examples that a sort has moved"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_depends_on_other_tokens_is_refused_with_its_line(mixture, layers, said):
    params, batch = arguments()
    with pytest.raises(UserError, match=said):
        declare(loss_of(mixture, layers), params, batch, topology="cpu:1", mesh={"data": 1}, microbatches=4)
