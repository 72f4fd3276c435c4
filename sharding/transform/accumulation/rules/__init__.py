"""One rule for each primitive on what parts do of it; what has none refuses as soon as examples reach it."""

from __future__ import annotations

from jax.extend import core

from ....ops.attention import attention_call
from ....ops.experts import experts_call
from ....program.primitives import Trait, primitives
from ..graph import PartGraph, Rule, inlined
from ..values import Held, Kind, NotInParts
from . import arranged, calls, lookups, loops, moves, regions, sums


def rule_of(eqn: core.JaxprEqn) -> Rule:
    """Return the rule that reads `eqn`."""
    if attention_call(eqn) is not None:
        return _ATTENTION
    if experts_call(eqn) is not None:
        return _EXPERTS
    return _RULES.get(eqn.primitive.name, unknown)


def unknown(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Refuse what nothing is known of."""
    del g, ins
    raise NotInParts(f"{eqn.primitive.name} over the examples is not understood")


def _on_sums(rule: Rule) -> Rule:
    """Return a rule that reads operations on incomplete sums first, and `rule` where there are examples."""

    def read(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
        if any(one.kind is Kind.EXAMPLES for one in ins):
            return rule(g, eqn, ins)
        if all(one.kind is not Kind.LATE for one in ins):
            outs = sums.linear(g, eqn, ins)
            if outs is not None:
                return outs
        return g.whole(eqn, ins)

    return read


def _within(rule: Rule) -> Rule:
    """Return a rule whose refusals name the call's own line beside that of an equation inside."""

    def read(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
        g.calls.append(eqn)
        try:
            return rule(g, eqn, ins)
        finally:
            g.calls.pop()

    return read


def _rules() -> dict[str, Rule]:
    found: dict[str, Rule] = dict.fromkeys(primitives(Trait.ELEMENTWISE), moves.elementwise)
    found |= dict.fromkeys(primitives(Trait.PASSING), moves.passing)
    found |= dict.fromkeys(primitives(Trait.BATCHED), moves.matrices)
    found |= dict.fromkeys(primitives(Trait.POOLING), moves.window)
    found |= dict.fromkeys(sums.REDUCTIONS, sums.reduce)
    found |= {
        name: moves.along("axis")
        for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "top_k")
    }
    found["approx_top_k"] = moves.along("reduction_dimension")
    found["reduce"] = sums.reduce_by
    found["sort"] = moves.along("dimension")
    names = ("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")
    found |= dict.fromkeys(names, lookups.scatter)
    same = ("random_wrap", "random_unwrap", "random_seed", "bitcast_convert_type")
    found |= dict.fromkeys(same, moves.same_axis)
    found |= dict.fromkeys(primitives(Trait.CHECKPOINT), calls.checkpoint)
    found |= {
        "random_bits": moves.drawn,
        "random_split": moves.drawn,
        "random_fold_in": moves.folded,
        "random_gamma": moves.gamma,
        "broadcast_in_dim": moves.broadcast_in_dim,
        "reshape": moves.reshape,
        "squeeze": moves.squeeze,
        "transpose": moves.transpose,
        "rev": moves.rev,
        "pad": moves.pad,
        "slice": moves.slice_,
        "dynamic_slice": moves.dynamic_slice,
        "dynamic_update_slice": moves.dynamic_update_slice,
        "concatenate": moves.concatenate,
        "split": moves.split,
        "stack": moves.stack,
        "unstack": moves.unstack,
        "tile": moves.tile,
        "triangular_solve": moves.triangular_solve,
        "fft": moves.fft,
        "dot_general": sums.dot_general,
        "conv_general_dilated": sums.convolution,
        "gather": lookups.gather,
        "scan": loops.scan,
        "while": loops.while_loop,
        "cond": loops.cond,
        "custom_vjp_call": _within(calls.custom_vjp),
        "custom_jvp_call": _within(calls.custom_jvp),
        "custom_linear_solve": calls.linear_solve,
    }
    found["ragged_dot_general"] = arranged.ragged_product
    found = {name: _on_sums(arranged.in_any_order(name, rule)) for name, rule in found.items()}
    among = dict.fromkeys(("psum", "psum_invariant", "pmax", "pmin", "ppermute"), regions.exchange)
    among |= dict.fromkeys(("all_gather", "all_gather_invariant", "reduce_scatter"), regions.gathered)
    among |= {"all_to_all": regions.traded, "shard_map": _on_sums(_within(regions.region))}
    found |= {name: arranged.in_any_order(name, rule) for name, rule in among.items()}
    plain = primitives(Trait.CALL) - primitives(Trait.CHECKPOINT) - {"custom_vjp_call", "custom_jvp_call"}
    return found | dict.fromkeys(plain, inlined)


_RULES = _rules()
_ATTENTION = _on_sums(calls.attention)
_EXPERTS = _on_sums(calls.experts)
