"""Attention over a sequence that lies over `context`: errors, bytes against their formula, memory by length.

``python benchmarks/context.py errors`` runs each way on eight simulated devices against the plain function in
float32, and prints the relative error of the loss and of the worst leaf of its gradient: meshes, causal or
not, packed, windows, a soft cap, grouped heads, narrower values, parts of the batch, layers run again.

``python benchmarks/context.py compiled [TOPOLOGY ...]`` has a layer of attention compiled at several lengths
(2 rows, 8 heads of 128, bfloat16, context=8): the bytes that a device sends beside the formula of
`ops.context.ways`, and the temporaries, in MiB. No device is needed.

``python benchmarks/context.py price [TOPOLOGY ...]`` has two layers of attention over eight devices compiled
in the shapes of `PRICED`, and prints their computing, estimated and compiled, and the step with what is sent.

``python benchmarks/context.py long`` plans Llama 3 8B with 16 rows of 1,048,576 tokens on v5p:8x8x8 and has a
few of its layers compiled (``--layers N``).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "64")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from meshwright.models import decoder, preset
from meshwright.sharding import Plan, UserError, declare, plan
from meshwright.sharding.cost.candidate import Candidate
from meshwright.sharding.cost.context import calls_of, laid_calls
from meshwright.sharding.ops import attention
from meshwright.sharding.ops.context.ways import WAYS
from meshwright.sharding.program import trace

NAMES = {
    "query": ("layers", "embed", "heads", "head_dim"),
    "key": ("layers", "embed", "kv_heads", "key_dim"),
    "value": ("layers", "embed", "kv_heads", "value_dim"),
    "output": ("layers", "heads", "value_dim", "embed"),
}
# Mesh, what the plan declares besides, what attention asks for.
CASES: tuple[tuple[dict[str, int], dict[str, Any], dict[str, Any]], ...] = (
    ({"context": 8}, {}, {}),
    ({"context": 4, "data": 2}, {}, {"packed": True}),
    ({"context": 4, "fsdp": 2}, {"remat": "full"}, {"causal": False}),
    ({"context": 2, "data": 2, "tensor": 2}, {"microbatches": 2}, {"packed": True, "cap": 4.0}),
    ({"context": 2, "fsdp": 2, "tensor": 2}, {}, {"packed": True, "kv_heads": 1}),
    ({"context": 4, "tensor": 2}, {}, {"value_width": 4, "kv_heads": 8}),
    ({"context": 8}, {}, {"packed": True, "window": 6}),
    ({"context": 4, "data": 2}, {}, {"window": 20}),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Priced:
    """Two layers of attention to price: rows of so many tokens, heads, their width, and what is asked for."""

    way: str
    length: int
    heads: int = 8
    kv_heads: int = 8
    width: int = 128
    rows: int = 2
    asked: dict[str, Any] = dataclasses.field(default_factory=dict)
    declared: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        told = {**self.asked, **self.declared}
        heads = f"{self.heads}/{self.kv_heads} heads of {self.width}"
        said = " ".join(f"{key}={value}" for key, value in told.items())
        return f"{self.way} {self.rows} x {self.length}, {heads} {said}".strip()


XLA, AGAIN = {"attention": "xla"}, {"remat": "full"}
# Full, causal, in a window; grouped heads; 8k to 128k tokens. None of them told the price anything.
PRICED = (
    Priced(way="ring", length=8192, rows=4, heads=16, declared=XLA),
    Priced(way="ring", length=32768, heads=16, kv_heads=4, asked={"causal": False}, declared=XLA | AGAIN),
    Priced(way="gathered", length=16384, rows=4, heads=16, kv_heads=4, width=64, declared=XLA | AGAIN),
    Priced(way="heads", length=8192, heads=32, kv_heads=8, declared=XLA),
    Priced(way="neighbours", length=131072, kv_heads=2, asked={"window": 4096}, declared=XLA),
    Priced(way="ring", length=16384, heads=16, kv_heads=4, declared=AGAIN),
    Priced(way="ring", length=65536, kv_heads=2, asked={"causal": False}),
    Priced(way="heads", length=32768, rows=4, heads=16, kv_heads=8),
    Priced(way="neighbours", length=65536, kv_heads=4, asked={"window": 8192}),
)


def loss_of(asked: dict[str, Any]) -> Any:
    """Return a loss of layers of attention."""
    options = {key: value for key, value in asked.items() if key in ("causal", "window", "cap")}

    def loss(params: Any, batch: Any) -> Any:
        def layer(x: Any, own: Any) -> tuple[Any, None]:
            arrays = (jnp.einsum("bse,ehd->bshd", x, own[name]) for name in ("query", "key", "value"))
            out = attention(*arrays, segment_ids=batch.get("segments"), **options)
            return x + jnp.einsum("bshd,hde->bse", out, own["output"]), None

        x, _ = jax.lax.scan(layer, batch["x"], params)
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    return loss


def shapes_of(
    layers: int, embed: int, heads: int, kv_heads: int, width: int, value_width: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters."""
    return {
        "query": (layers, embed, heads, width),
        "key": (layers, embed, kv_heads, width),
        "value": (layers, embed, kv_heads, value_width),
        "output": (layers, heads, value_width, embed),
    }


def errors() -> None:
    """Print the errors of each way in each case."""
    for mesh, declared, asked in CASES:
        shapes = shapes_of(2, 16, 8, asked.get("kv_heads", 4), 8, asked.get("value_width", 8))
        keys = jax.random.split(jax.random.key(0), len(shapes))
        params = {
            name: 0.1 * jax.random.normal(key, shape)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        rng = np.random.default_rng(0)
        batch = {"x": rng.normal(size=(4, 64, 16)).astype(np.float32)}
        if asked.get("packed"):
            batch["segments"] = np.sort(rng.integers(0, 3, (4, 64)), axis=1).astype(np.int32)
        loss = loss_of(asked)
        value, gradients = jax.jit(jax.value_and_grad(loss))(params, batch)
        for way in WAYS:
            told = {"topology": "cpu:8", "mesh": mesh, "names": NAMES, "context": way, **declared}
            try:
                made = declare(loss, params, batch, **told)
            except UserError as error:
                print(f"{mesh} {asked} {way}: {error}", flush=True)
                continue
            on = made.make_mesh()
            where = made.shardings(params, on), made.shardings(batch, on, "batch")
            found, learnt = jax.jit(jax.value_and_grad(made.apply(loss)))(
                *jax.device_put((params, batch), where)
            )
            worst = max(
                float(np.linalg.norm(np.asarray(learnt[name]) - one) / np.linalg.norm(one))
                for name, one in gradients.items()
            )
            print(
                f"{mesh} {declared} {asked} {way}: loss {abs(found - value) / value:.1e}, leaf {worst:.1e}",
                flush=True,
            )


def compiled(topology: str, lengths: list[int]) -> None:
    """Print what a layer sends over `context`, by formula and as compiled, and its temporaries."""
    for length in lengths:
        for way in WAYS:
            options = {"window": 1024} if way == "neighbours" else {}
            shapes = shapes_of(1, 1024, 8, 8, 128, 128)
            params = {name: jax.ShapeDtypeStruct(shape, "bfloat16") for name, shape in shapes.items()}
            batch = {"x": jax.ShapeDtypeStruct((2, length, 1024), "bfloat16")}
            loss, mesh = loss_of(options), {"context": 8}
            told = {"topology": topology, "mesh": mesh, "names": NAMES, "context": way}
            made = declare(loss, params, batch, optimizer=optax.sgd(1e-3), **told)
            try:
                proof = made.verify().proof
            except UserError as error:
                print(f"{topology} {length} {way}: not compiled: {str(error)[:200]}", flush=True)
                continue
            assert proof is not None
            (one,) = laid_calls(*_laid(loss, params, batch, made))
            moved = one.sent(way)
            kinds = ("collective_permute", "all_gather", "all_to_all", "reduce_scatter")
            rows = [row for row in proof.collectives if row.kind in kinds]
            wire = sum(row.wire_bytes for row in rows)
            told = ", ".join(f"{row.kind} x{row.count:.0f}" for row in rows)
            print(
                f"{topology} {length} {way}: sent {wire / 2**20:.0f}, formula "
                f"{(moved.forward + moved.backward) / 2**20:.0f} MiB; temporaries "
                f"{proof.memory['temporaries'] / 2**20:.0f} MiB; {told}",
                flush=True,
            )


def price(topology: str) -> None:
    """Print what the estimate and the compiler say of each shape of `PRICED`, in milliseconds."""
    for one in PRICED:
        shapes = shapes_of(2, 1024, one.heads, one.kv_heads, one.width, one.width)
        params = {name: jax.ShapeDtypeStruct(shape, "bfloat16") for name, shape in shapes.items()}
        batch = {"x": jax.ShapeDtypeStruct((one.rows, one.length, 1024), "bfloat16")}
        told = {"topology": topology, "mesh": {"context": 8}, "names": NAMES, "context": one.way}
        told |= {"remat": "none", **one.declared}
        try:
            made = declare(loss_of(one.asked), params, batch, optimizer=optax.sgd(1e-3), **told)
            proof = made.verify().proof
        except UserError as error:
            print(f"{topology} {one}: not compiled: {str(error)[:200]}", flush=True)
            continue
        assert proof is not None
        assert made.estimate is not None
        here = ("compute/", "kept", "optimizer", "stacks")
        computed = [
            sum(size for item, size in made.estimate.time.items() if item.startswith(here)),
            sum(proof.time.get(item, 0.0) for item in ("compute", "copies", "prefetch")),
        ]
        # A host's time for a step is of no compiled program.
        step = made.estimate.step_seconds - made.estimate.time["host"], proof.step_seconds
        told_of = ", ".join(
            f"{name} {1e3 * own:.1f}, compiled {1e3 * other:.1f} ({own / other - 1:+.1%})"
            for name, (own, other) in (("computing", computed), ("step", step))
        )
        print(f"{topology} {one}: {told_of}", flush=True)


def _laid(loss: Any, params: Any, batch: Any, made: Plan) -> tuple[Any, Candidate]:
    """Return the calls of attention, and the dims of a plan as a candidate has them."""
    program = trace(loss, params, batch, names={0: NAMES}, rows=("batch", "sequence"))
    axes = {name: dim.axes for name, dim in made.dims.items()}
    dims = {dim.id: axes[dim.name] for dim in program.dims if axes.get(dim.name)}
    return calls_of(program), Candidate(mesh=made.mesh, dims=dims)


def long(layers: int) -> None:
    """Plan 8B with rows of a million tokens, and have `layers` of it compiled."""
    config = preset("llama3-8b", compute_dtype="bfloat16")
    for count in (config.layers, layers):
        model = decoder(dataclasses.replace(config, layers=count))
        params = jax.eval_shape(model.init, jax.random.key(0))
        ids = jax.ShapeDtypeStruct((16, 2**20), "int32")
        batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ids)
        told = {"topology": "v5p:8x8x8", "optimizer": optax.adamw(3e-4), "names": model.names}
        made = plan(model.loss, params, batch, **told)
        assert made.estimate is not None
        print(
            f"{count} layers: {made.mesh}, context by {made.context}, {made.estimate.step_seconds:.1f} s, "
            f"MFU {made.estimate.mfu:.1%}, {made.estimate.needed_bytes / 2**30:.1f} GiB",
            flush=True,
        )
    proof = made.verify().proof
    assert proof is not None
    print(f"compiled: {proof.step_seconds:.1f} s, peak {proof.peak_bytes / 2**30:.1f} GiB")
    for finding in proof.findings:
        print(f"found: {finding.kind}: {finding.what}")


def main() -> None:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("errors", "compiled", "price", "long"))
    parser.add_argument("topologies", nargs="*", default=["v5e:2x4", "v5p:2x2x2", "h100:1x8"])
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 32768, 131072])
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    print(f"jax {jax.__version__}")
    if args.what == "errors":
        errors()
    elif args.what == "long":
        long(args.layers)
    else:
        for topology in args.topologies:
            price(topology) if args.what == "price" else compiled(topology, args.lengths)


if __name__ == "__main__":
    main()
