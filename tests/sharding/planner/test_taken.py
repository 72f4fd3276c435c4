"""What a plan is priced as having for attention is what its step holds: a kernel, blocks, or plain XLA."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from meshwright.sharding import UserError, declare
from meshwright.sharding.cost.candidate import Candidate
from meshwright.sharding.cost.context import calls_of, site_of
from meshwright.sharding.ops import attention
from meshwright.sharding.ops.context.taken import BLOCKS
from meshwright.sharding.ops.context.ways import NEIGHBOURS, RING
from meshwright.sharding.planner.declared import Declared
from meshwright.sharding.planner.inputs import Problem
from meshwright.sharding.verify.export import abstract_mesh

NAMES = dict.fromkeys(("query", "key"), ("embed", "heads", "head_dim"))
NAMES["value"] = ("embed", "heads", "width of values")
NAMES["output"] = ("heads", "width of values", "mlp")
# What in a traced step tells that a kernel, or pairs of blocks, carry attention out.
SIGNS = {
    "splash": r"splash_attention",
    "cudnn": r"dot_product_attention_fwd",
    BLOCKS: r"f32\[\d+,\d+,\d+,512,512\]",
}
MESHES: tuple[tuple[dict[str, int], dict[str, Any]], ...] = (
    ({"data": 8}, {}),
    ({"context": 8}, {}),
    ({"context": 4, "tensor": 2}, {"heads": "tensor"}),
    ({"data": 4, "tensor": 2}, {"sequence": "tensor", "heads": None}),
    ({"data": 4, "tensor": 2}, {"head_dim": "tensor", "heads": None}),
)
KINDS: dict[str, dict[str, Any]] = {
    "packed": {"packed": True},
    "plain": {},
    "windowed": {"window": 256, "packed": True},
    "capped": {"cap": 30.0, "packed": True},
}


def loss_of(packed: bool = False, **asked: Any) -> Any:
    def loss(params: Any, batch: Any) -> Any:
        arrays = (jnp.einsum("bse,ehd->bshd", batch["x"], params[name]) for name in ("query", "key", "value"))
        out = attention(*arrays, segment_ids=batch["segments"] if packed else None, **asked)
        out = jnp.einsum("bshd,hde->bse", out, params["output"])
        return jnp.mean(jnp.square(out.astype(jnp.float32)))

    return loss


def sites() -> list[Any]:
    return [
        (mesh, rules, way)
        for mesh, rules in MESHES
        for way in ((None, "gathered", "heads", "ring") if "context" in mesh else (None,))
    ]


@pytest.mark.numerics(False)
@pytest.mark.parametrize("topology", ["h100:1x8", pytest.param("v5e:2x4", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "packed" else pytest.mark.slow) for kind in KINDS]
)
def test_what_is_priced_is_what_the_step_holds(topology: str, kind: str) -> None:
    shape = jax.ShapeDtypeStruct
    loss, params = loss_of(**KINDS[kind]), dict.fromkeys(NAMES, shape((64, 8, 64), "bfloat16"))
    params["output"] = shape((8, 64, 64), "bfloat16")
    batch = {"x": shape((8, 8192, 64), "bfloat16"), "segments": shape((8, 8192), "int32")}
    problem = Problem(loss=loss, params=params, batch=batch, optimizer=None, names=NAMES)
    (one,), seen = calls_of(problem.program), set()
    refused: list[str | None] = []
    for mesh, rules, way in sites():
        asked = {"topology": topology, "mesh": mesh, "names": NAMES, "rules": rules, "context": way}
        try:
            made = declare(loss, params, batch, **asked)
        except UserError:
            # A way that cannot carry such a call out.
            refused.append(way)
            continue
        axes = {name: dim.axes for name, dim in made.dims.items()}
        dims = {dim.id: axes[dim.name] for dim in problem.program.dims if axes.get(dim.name)}
        layout = Candidate(mesh=made.mesh, dims=dims, context=made.context)
        declared = Declared()
        by = problem.kernel(made.topology, declared).taken(site_of(one, layout), made.context).by
        step = jax.grad(made.apply(loss, abstract_mesh(made)))
        said = str(jax.make_jaxpr(step)(params, batch))
        found = {name for name, sign in SIGNS.items() if re.search(sign, said)}
        assert found == ({by} if by else set()), (mesh, rules, way)
        assert any("XLA" in note for note in made.notes) == (by in (None, BLOCKS)), made.notes
        # What is priced runs by a kernel where scores are never in memory.
        pricer = problem.pricer(made.topology, declared).of(layout)
        assert (pricer.execution.attention is not None) == (by is not None)
        # Blocks, and of kernels a ring's pieces and windows with neighbours, have seconds of their own.
        apart = made.context in (RING, NEIGHBOURS) and site_of(one, layout).over_context
        spread = by == BLOCKS or (by is not None and apart)
        assert set(pricer.attended(layout)) == ({one.equation.index} if spread else set())
        seen.add(by)
    assert None not in refused
    if (topology, kind) == ("h100:1x8", "packed"):
        assert seen == {"cudnn", BLOCKS, None}
