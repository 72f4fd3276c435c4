"""Experts on simulated devices: errors against one device's, and the bytes that exchanges move.

`python benchmarks/experts.py` prints, for meshes of eight simulated devices, choices and one or more rounds,
the error of the loss and of the worst leaf of its gradient (float32), and the bytes that a device sends by
all-to-alls: in the compiled program, by the formula, and as the plan's price has them. The formula, of a
layer in one round, forward and backward, to the experts and back:

    (4 · embed + 2) · itemsize · slots · (peers - 1),  slots = 1.25 · tokens · choices / peers

Two are a row's weight, to its expert, and its gradient, back. Then the errors of layers of experts on meshes
with stages, which exchange within a stage.

`--compile TOPOLOGY …` (of eight devices) prints the products of a compiled step over those that rows need,
by the chip's kernel and by a loop over tiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import re
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "64")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from meshwright.sharding import declare, plan
from meshwright.sharding.cost.candidate import Candidate
from meshwright.sharding.cost.placement import place
from meshwright.sharding.cost.profile import profile
from meshwright.sharding.ops.experts import experts
from meshwright.sharding.ops.rounds import slots_of

NAMES = {
    "enter": ("given", "embed"),
    "router": ("embed", "scores"),
    "gate": ("experts", "embed", "mlp"),
    "up": ("experts", "embed", "mlp"),
    "down": ("experts", "mlp", "embed"),
}
MESHES = (
    {"expert": 8},
    {"data": 2, "expert": 4},
    {"fsdp": 2, "expert": 4},
    {"data": 2, "expert": 2, "tensor": 2},
    {"fsdp": 8},
    {"data": 2, "tensor": 4},
)
# Stages of layers, with no axis beside the experts' and with one of each kind, and the schedule.
STAGED = (
    ({"stage": 2, "expert": 2}, "1f1b"),
    ({"stage": 2, "expert": 2}, "delayed"),
    ({"stage": 2, "expert": 2, "fsdp": 2}, "1f1b"),
    ({"stage": 2, "expert": 2, "data": 2}, "1f1b"),
    ({"stage": 2, "expert": 2, "tensor": 2}, "1f1b"),
)
LAYERS, MICROBATCHES = 4, 4
EXPERTS, EMBED, MLP = 16, 32, 48
_ALL_TO_ALL = re.compile(r"= (.*?) all-to-all\(.*op_name=\"([^\"]*)\"")
_ARRAY = re.compile(r"f32\[([\d,]*)\]")


def loss_of(choices: int) -> Any:
    def loss(params: Any, batch: Any) -> Any:
        # Where tokens come from parameters their gradients travel, too.
        x = batch["x"] @ params["enter"]
        scores = jax.nn.softmax(x @ params["router"])
        weights, chosen = jax.lax.top_k(scores, choices)
        matrices = {name: params[name] for name in ("gate", "up", "down")}
        return jnp.mean(jnp.square(experts(x, weights, chosen, **matrices) - batch["y"]))

    return loss


def problem(rows: int, sequence: int, skew: float) -> tuple[Any, Any]:
    keys = iter(jax.random.split(jax.random.key(0), 8))
    sizes = {"given": EMBED, "experts": EXPERTS, "embed": EMBED, "mlp": MLP, "scores": EXPERTS}
    params = {
        name: jax.random.normal(next(keys), tuple(sizes[dim] for dim in dims)) / 4
        for name, dims in NAMES.items()
    }
    batch = {name: jax.random.normal(next(keys), (rows, sequence, EMBED)) for name in ("x", "y")}
    # Tokens of a common direction like the same experts best.
    return params, {**batch, "x": batch["x"] + skew * jnp.ones(EMBED)}


def measured(mesh: dict[str, int], choices: int, skew: float, rows: int = 64, sequence: int = 512) -> dict:
    """Return the errors, and the bytes compiled, by formula and priced."""
    loss, (params, batch) = loss_of(choices), problem(rows, sequence, skew)
    made = plan(
        loss, params, batch, topology="cpu:8", optimizer=optax.sgd(0.1), names=NAMES, mesh=mesh, remat="none"
    )
    devices = made.make_mesh()
    placed = jax.device_put(
        (params, batch), (made.shardings(params, devices), made.shardings(batch, devices, "batch"))
    )
    step = jax.jit(jax.value_and_grad(made.apply(loss))).lower(*placed).compile()
    plain = jax.jit(jax.value_and_grad(loss))(params, batch)
    peers = mesh.get("expert", 1)
    tokens = rows * sequence // math.prod(size for axis, size in mesh.items() if axis != "tensor")
    slots = slots_of(tokens, choices, peers)
    return {
        **apart(step(*placed), plain),
        "compiled": sent(step.as_text(), peers),
        "formula": (4 * EMBED + 2) * 4 * slots * (peers - 1),
        "priced": priced(made, peers),
    }


def apart(found: Any, plain: Any) -> dict[str, float]:
    """Return the relative errors of the loss and of the worst leaf of its gradient."""
    (value, slopes), (wanted, gradients) = found, plain
    leaves = (
        np.linalg.norm(np.asarray(slopes[n]) - one) / np.linalg.norm(one) for n, one in gradients.items()
    )
    return {"loss": abs(float(value - wanted) / float(wanted)), "leaf": max(map(float, leaves))}


def staged(mesh: dict[str, int], choices: int, schedule: str) -> dict[str, float]:
    """Return the errors of layers of experts that go through stages, and are routed by what layers give."""
    one, batch = problem(8 * MICROBATCHES * math.prod(mesh.values()), 8, 0.0)
    keys = jax.random.split(jax.random.key(1), LAYERS)
    names = {name: ("layers", *dims) for name, dims in NAMES.items() if name != "enter"}
    params = {
        name: jax.vmap(lambda key, like=one[name]: jax.random.normal(key, like.shape) / 4)(keys)
        for name in names
    }

    def loss(params: Any, batch: Any) -> Any:
        def layer(x: Any, own: Any) -> tuple[Any, None]:
            h = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
            weights, chosen = jax.lax.top_k(jax.nn.softmax(h @ own["router"]), choices)
            return x + experts(
                h, weights, chosen, **{name: own[name] for name in ("gate", "up", "down")}
            ), None

        x, _ = jax.lax.scan(layer, batch["x"], params)
        return jnp.mean(jnp.square(x - batch["y"]))

    count = math.prod(mesh.values())
    how = {"topology": f"cpu:{count}", "names": names, "mesh": mesh, "microbatches": MICROBATCHES}
    made = declare(loss, params, batch, schedule=schedule, remat="full", **how)
    devices = made.make_mesh(devices=jax.devices()[:count])
    where = made.shardings(params, devices), made.shardings(batch, devices, "batch")
    step = jax.jit(jax.value_and_grad(made.apply(loss, mesh=devices)))
    found = jax.device_get(step(*jax.device_put((params, batch), where)))
    return apart(found, jax.jit(jax.value_and_grad(loss))(params, batch))


def sent(text: str, peers: int) -> float:
    """Return the bytes that a device sends by the all-to-alls of floats of a program, but in later rounds."""
    total = 0.0
    for result, name in _ALL_TO_ALL.findall(text):
        if "while/body" not in name:
            sizes = (math.prod(int(n) for n in dims.split(",") if n) for dims in _ARRAY.findall(result))
            total += 4.0 * sum(sizes) * (peers - 1) / peers
    return total


def priced(made: Any, peers: int) -> float:
    """Return the bytes that a device sends by all-to-alls as a plan is priced."""
    program = made.problem.program
    by_name = {dim.name: dim.id for dim in program.dims}
    dims = {by_name[name]: one.axes for name, one in made.dims.items() if one.axes}
    placement = place(profile(program), Candidate(mesh=dict(made.mesh), dims=dims))
    # With a little for the integers that say where rows go.
    held = sum(float(one.bytes.sum()) for one in placement.traffic if one.kind == "all_to_all")
    return held / peers * (peers - 1) / peers


def compiled(topology: str, mesh: dict[str, int]) -> None:
    """Print the products of a compiled step of two layers over those that are needed, by each kernel."""
    layers, rows, sequence, choices, embed, mlp = 2, 64, 128, 2, 512, 256
    sizes = {"layers": layers, "experts": EXPERTS, "embed": embed, "mlp": mlp, "scores": EXPERTS}
    names = {name: ("layers", *dims) for name, dims in NAMES.items() if name != "enter"}
    params = {
        name: jax.ShapeDtypeStruct(tuple(sizes[dim] for dim in dims), jnp.float32)
        for name, dims in names.items()
    }
    batch = dict.fromkeys(("x", "y"), jax.ShapeDtypeStruct((rows, sequence, embed), jnp.float32))

    def loss(params: Any, batch: Any) -> Any:
        def layer(x: Any, own: Any) -> tuple[Any, None]:
            weights, chosen = jax.lax.top_k(jax.nn.softmax((x @ own["router"]).astype(jnp.float32)), choices)
            matrices = {name: own[name].astype(x.dtype) for name in ("gate", "up", "down")}
            return x + experts(x, weights, chosen, **matrices), None

        x, _ = jax.lax.scan(layer, batch["x"].astype(jnp.bfloat16), params)
        return jnp.mean(jnp.square(x.astype(jnp.float32) - batch["y"]))

    optimizer = optax.adam(1e-3)
    declared = {"mesh": mesh, "names": names, "remat": "none"}
    made = plan(loss, params, batch, topology=topology, optimizer=optimizer, **declared)
    each = rows * sequence / math.prod(made.mesh.values()) * layers
    needed = 3 * 2 * each * (choices * 3 * embed * mlp + embed * EXPERTS)
    for kernels in (made.kernels, {}):
        one = dataclasses.replace(made, kernels=kernels)
        proof = one.verify(loss, params, batch, optimizer).proof
        name = kernels.get("experts", {}).get("implementation", "tiles")
        unknown = sum(finding.kind == "unknown_trip_count" for finding in proof.findings)
        print(
            f"{topology:8} {mesh!s:24} {name:9} products / needed {proof.flops / needed:.3f}, "
            f"{unknown} loops of unknown length, {proof.peak_bytes / 2**20:.0f} MiB",
            flush=True,
        )


def of_stages() -> None:
    """Print the errors of layers of experts on meshes with stages."""
    print(f"{'mesh with stages':44} choices schedule {'loss':>8} {'leaf':>8}")
    for (mesh, schedule), choices in itertools.product(STAGED, (1, 2)):
        row = staged(mesh, choices, schedule)
        print(f"{mesh!s:44} {choices:7} {schedule:8} {row['loss']:8.1e} {row['leaf']:8.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Experts: errors, bytes, products.")
    parser.add_argument("--compile", nargs="+", metavar="TOPOLOGY", default=[])
    parser.add_argument("--stages", action="store_true", help="only the errors of meshes with stages")
    args = parser.parse_args()
    if args.stages:
        of_stages()
        return
    for topology in (found := args.compile):
        for mesh in ({"expert": 8}, {"data": 2, "expert": 2, "tensor": 2}):
            compiled(topology, mesh)
    if found:
        return
    print(f"{'mesh':44} choices skew {'loss':>8} {'leaf':>8} {'compiled':>10} {'formula':>10} {'priced':>10}")
    for mesh in MESHES:
        for choices, skew in ((1, 0.0), (2, 0.0), (4, 2.0)):
            row = measured(mesh, choices, skew)
            print(
                f"{mesh!s:44} {choices:7} {skew:4} {row['loss']:8.1e} {row['leaf']:8.1e} "
                f"{row['compiled']:10.0f} {row['formula']:10.0f} {row['priced']:10.0f}",
                flush=True,
            )
    of_stages()


if __name__ == "__main__":
    main()
