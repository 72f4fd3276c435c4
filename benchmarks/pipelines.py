"""Pipelines: errors of loss and gradients, collectives in and outside of loops, peaks, executed work, prices.

    python benchmarks/pipelines.py [errors] [memory] [work] [stacks] [price] [held] [ways] [models]

On simulated devices, with a loss of its own: a packed decoder without attention, its table tied. `stacks`
are of two stacks of layers, an encoder and a decoder. Prices are held to what the compiler for v5p makes of
it, and in `held` the memory of each way through stages, of two stacks too; the time and memory of ways
through them in bfloat16 (`ways`) to that for H100 too. `models` are those of `pipeline_models.py`, written
as other people write them.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's collectives want more threads than devices.
os.environ.setdefault("NPROC", "64")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from meshwright.sharding import declare, plan
from meshwright.sharding.compiled.flops import flops
from meshwright.sharding.cost.pipeline import Lockstep
from meshwright.sharding.cost.stacks import held_layers
from meshwright.sharding.hlo.loops import loops, run_counts
from meshwright.sharding.hlo.text import parse_hlo
from pipeline_models import MODELS, errors_of

LAYERS, WIDTH, VOCAB, TIME = 8, 32, 64, 16
NAMES = {
    "blocks": {"up": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed")},
    "table": ("vocab", "embed"),
}


def init(width: int = WIDTH, layers: int = LAYERS) -> Any:
    keys = jax.random.split(jax.random.key(0), 3)
    up = jax.random.normal(keys[0], (layers, width, 4 * width)) / width**0.5
    down = jax.random.normal(keys[1], (layers, 4 * width, width)) / (2 * width**0.5)
    return {"blocks": {"up": up, "down": down}, "table": jax.random.normal(keys[2], (VOCAB, width)) * 0.3}


def batch(rows: int) -> Any:
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, rows, TIME)).astype(np.int32)
    return {"tokens": ids[0], "targets": ids[1], "counted": (ids[1] % 3 > 0).astype(np.float32)}


def loss(params: Any, batch: Any) -> Any:
    def block(x: Any, weights: Any) -> Any:
        h = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
        return x + jax.nn.silu(h @ weights["up"]) @ weights["down"], None

    x, _ = jax.lax.scan(block, params["table"][batch["tokens"]], params["blocks"])
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ params["table"].T, batch["targets"])
    return (losses * batch["counted"]).sum() / batch["counted"].sum()


def loss_in_halves(params: Any, batch: Any) -> Any:
    """Return what `loss` does, worked out in bfloat16 as most models are."""
    half = jnp.bfloat16

    def block(x: Any, weights: Any) -> Any:
        h = x.astype(jnp.float32)
        h = (h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6)).astype(half)
        return x + jax.nn.silu(h @ weights["up"].astype(half)) @ weights["down"].astype(half), None

    table = params["table"].astype(half)
    x, _ = jax.lax.scan(block, table[batch["tokens"]], params["blocks"])
    logits = (x @ table.T).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return (losses * batch["counted"]).sum() / batch["counted"].sum()


OF_TWO = {"encoder": NAMES["blocks"], "decoder": NAMES["blocks"], "table": NAMES["table"]}


def init_two(width: int = WIDTH, encoder: int = LAYERS, decoder: int = LAYERS) -> Any:
    return {"encoder": init(width, encoder)["blocks"], "decoder": init(width, decoder)["blocks"]} | {
        "table": init(width)["table"]
    }


def loss_of_two(params: Any, batch: Any) -> Any:
    """Layers that read what all of the other stack's have given, and a table that both look up."""

    def normed(x: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)

    def encode(x: Any, weights: Any) -> Any:
        return x + jax.nn.silu(normed(x) @ weights["up"]) @ weights["down"], None

    def decode(x: Any, weights: Any) -> Any:
        return x + jax.nn.silu(normed(x + seen) @ weights["up"]) @ weights["down"], None

    seen = normed(jax.lax.scan(encode, params["table"][batch["tokens"]], params["encoder"])[0])
    x, _ = jax.lax.scan(decode, params["table"][batch["tokens"][:, ::-1]], params["decoder"])
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ params["table"].T, batch["targets"])
    return (losses * batch["counted"]).sum() / batch["counted"].sum()


SCHEDULES = ("1f1b", "delayed")
# A mesh, chunks a stage, and layers.
KINDS = (
    ({"stage": 2}, 1, 8),
    ({"stage": 4, "data": 2}, 1, 8),
    ({"stage": 2, "data": 2, "fsdp": 2}, 1, 8),
    ({"stage": 2, "data": 2, "tensor": 2}, 1, 8),
    ({"stage": 4, "data": 2}, 2, 8),
    ({"stage": 2, "fsdp": 2, "tensor": 2}, 4, 8),
    ({"stage": 4, "data": 2}, 1, 7),
    ({"stage": 2, "data": 2, "fsdp": 2}, 2, 7),
)


def compiled(
    mesh: dict[str, int],
    microbatches: int,
    rows: int,
    width: int = WIDTH,
    remat: str = "full",
    chunks: int = 1,
    layers: int = LAYERS,
    schedule: str | None = None,
    stage_remat: bool = True,
    decoder: int = 0,
) -> Any:
    """Return a compiled step and what it takes; with layers of a `decoder` they are a second stack's."""
    count = int(np.prod(list(mesh.values())))
    params, data = init_two(width, layers, decoder) if decoder else init(width, layers), batch(rows)
    how = {"topology": f"cpu:{count}", "mesh": mesh, "microbatches": microbatches}
    how |= {"interleave": chunks, "schedule": schedule, "stage_remat": stage_remat}
    function, names = (loss_of_two, OF_TWO) if decoder else (loss, NAMES)
    made = declare(function, params, data, remat=remat, names=names, **how)
    devices = made.make_mesh(devices=jax.devices()[:count])
    where = made.shardings(params, devices), made.shardings(data, devices, "batch")
    args = jax.device_put((params, data), where)
    return jax.jit(jax.value_and_grad(made.apply(function, mesh=devices))).lower(*args).compile(), args


def counted(program: Any) -> Iterator[str]:
    module = parse_hlo(program.as_text())
    runs = run_counts(module, loops(module), lambda conditional: "")
    found: dict[str, Counter[str]] = {"in loops": Counter(), "outside": Counter()}
    for one in module.instructions.values():
        if one.collective is not None and not one.opcode.endswith("-done") and one.computation in runs:
            where = "outside" if one.computation == module.entry else "in loops"
            found[where][one.collective.kind] += int(runs[one.computation])
    for where, kinds in found.items():
        yield f"{where} {dict(kinds)}"


def errors() -> None:
    """Print the relative error of the loss and of the worst gradient leaf, and the collectives of a step."""
    for (mesh, chunks, layers), schedule in itertools.product(KINDS, SCHEDULES):
        for microbatches in (2, 5, 8):
            rows = 8 * microbatches * mesh["stage"]
            how = {"chunks": chunks, "layers": layers, "schedule": schedule}
            program, args = compiled(mesh, microbatches, rows, **how)
            apart, worst = errors_beside(program(*args), loss, init(layers=layers), batch(rows))
            kind = f"{mesh} {schedule} interleave={chunks} layers={layers} microbatches={microbatches}"
            print(f"{kind}: loss {apart:.1e}, gradient {worst:.1e};", *counted(program))


def errors_beside(found: Any, function: Any, params: Any, data: Any) -> tuple[float, float]:
    """Return the relative error of the loss, and of the worst leaf of its gradient."""
    value, slopes = jax.device_get(found)
    wanted, plain = jax.jit(jax.value_and_grad(function))(params, data)
    pairs = zip(jax.tree.leaves(slopes), jax.tree.leaves(plain), strict=True)
    worst = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
    return abs(float(value - wanted) / float(wanted)), worst


def memory() -> None:
    """Print the compiled temporaries of 8 to 128 microbatches of the same rows each."""
    meshes = (({"stage": 4}, 1), ({"stage": 2, "data": 2}, 1), ({"stage": 4}, 2))
    for (mesh, chunks), schedule in itertools.product(meshes, SCHEDULES):
        held = []
        for count in (8, 32, 128):
            program, _ = compiled(mesh, count, count * 8, width=64, chunks=chunks, schedule=schedule)
            held.append(program.memory_analysis().temp_size_in_bytes)
        said = [f"{one / 2**20:.2f} MiB" for one in held]
        print(f"{mesh} {schedule} interleave={chunks}: temporaries of 8, 32 and 128 microbatches {said}")


def executed(program: Any) -> float:
    """Return the FLOPs of the products that a device executes in a compiled step."""
    module = parse_hlo(program.as_text())
    runs = run_counts(module, loops(module), lambda conditional: "")
    known = [one for one in module.instructions.values() if one.computation in runs]
    return sum(runs[one.computation] * flops(module, one) for one in known)


def work() -> None:
    """Print the work of layers executed over needed, by the formula 1 + (p - 1) / (v M).

    Of weights' gradients that are delayed none is made in vain: of (p - 1) / (v M) 3/4 are left, and 2/3
    where nothing is made again. Needed are two products of a layer forward, two made again by its stage,
    unless it keeps what `remat` keeps, and four of gradients; three of the head. Copies count too.
    """
    kinds = (
        (2, 8, 1, 8),
        (4, 8, 1, 8),
        (4, 16, 1, 8),
        (2, 8, 2, 8),
        (2, 8, 4, 16),
        (4, 8, 2, 16),
        (4, 8, 1, 7),
    )
    ways = itertools.product(kinds, SCHEDULES, (True, False))
    for (stages, microbatches, chunks, layers), schedule, again in ways:
        how = {"chunks": chunks, "layers": layers, "schedule": schedule}
        how |= {"remat": "none" if again else "dots", "stage_remat": again}
        made = 8 if again else 6
        program, _ = compiled({"stage": stages}, microbatches, microbatches * 8, **how)
        tokens = 8 * microbatches * TIME
        needed = made * (layers / stages) * 2 * tokens * WIDTH * 4 * WIDTH
        head = 3 * 2 * tokens * WIDTH * VOCAB / stages
        share = (executed(program) - head) / needed
        delayed = schedule == "delayed"
        ticks = Lockstep(stages=stages, chunks=chunks, microbatches=microbatches, delayed=delayed)
        filled = held_layers(layers, stages, chunks) * stages / layers
        late = 2 / made
        taken = (1 - late) * ticks.layer_ticks + late * ticks.weight_ticks
        formula = filled * taken / (chunks * microbatches)
        kind = f"{schedule}{'' if again else ', kept over ticks'} stage={stages}"
        kind += f" microbatches={microbatches} interleave={chunks} layers={layers}"
        print(f"{kind}: {share:.3f}, by the formula {formula:.3f}")


# Of two stacks: a mesh, microbatches, chunks a stage, layers of each.
STACKS = (
    ({"stage": 4}, 8, 1, 8, 8),
    ({"stage": 4}, 32, 1, 8, 8),
    ({"stage": 2}, 8, 2, 8, 8),
    ({"stage": 2}, 32, 2, 8, 8),
    ({"stage": 2, "data": 2, "fsdp": 2}, 5, 1, 7, 6),
    ({"stage": 2, "fsdp": 2, "tensor": 2}, 5, 2, 8, 4),
)


def stacks() -> None:
    """Print errors, temporaries and executed products of two stacks of layers, by the formula of `work`."""
    for (mesh, microbatches, chunks, encoder, decoder), schedule in itertools.product(STACKS, SCHEDULES):
        stages, rows = mesh["stage"], 8 * microbatches * mesh["stage"]
        how = {"chunks": chunks, "layers": encoder, "decoder": decoder, "schedule": schedule}
        program, args = compiled(mesh, microbatches, rows, remat="none", **how)
        params = init_two(encoder=encoder, decoder=decoder)
        apart, worst = errors_beside(program(*args), loss_of_two, params, batch(rows))
        held = program.memory_analysis().temp_size_in_bytes / 2**20
        kind = (
            f"{mesh} {schedule} interleave={chunks} layers={encoder}, {decoder} microbatches={microbatches}"
        )
        said = f"{kind}: loss {apart:.1e}, gradient {worst:.1e}; temporaries {held:.2f} MiB"
        if mesh == {"stage": stages}:
            tokens = rows * TIME / stages
            needed = 8 * (encoder + decoder) * 2 * tokens * WIDTH * 4 * WIDTH
            share = (executed(program) - 3 * 2 * tokens * WIDTH * VOCAB) / needed
            ticks = Lockstep(
                stages=stages, chunks=chunks, microbatches=microbatches, delayed=schedule == "delayed"
            )
            formula = (3 * ticks.layer_ticks + ticks.weight_ticks) / (4 * chunks * microbatches)
            said += f"; executed over needed {share:.3f}, by the formula {formula:.3f}"
        print(said, flush=True)


# A mesh, microbatches, chunks a stage, layers and rows of a microbatch that are priced. Sizes are those of a
# real model's layers: a TPU's own memory takes up to 128 MiB of what a small step would have in HBM.
PRICED = (
    ({"stage": 4}, 8, 1, 8, 1024),
    ({"stage": 4}, 32, 1, 16, 512),
    ({"stage": 4}, 128, 1, 8, 256),
    ({"stage": 4}, 8, 2, 8, 1024),
    ({"stage": 4}, 16, 2, 16, 512),
    ({"stage": 2, "fsdp": 2}, 8, 1, 8, 1024),
    ({"stage": 2, "fsdp": 2}, 16, 2, 8, 1024),
    ({"stage": 2, "data": 2}, 8, 2, 8, 1024),
)


def price() -> None:
    """Print the estimate beside what the compiler for v5p says: memory, and seconds over the stages."""
    for mesh, microbatches, chunks, layers, rows in PRICED:
        how = {"topology": "v5p:2x2x1", "mesh": mesh, "names": NAMES, "microbatches": microbatches}
        params, data = jax.eval_shape(lambda layers=layers: init(4096, layers)), batch(microbatches * rows)
        planned = plan(
            loss, params, data, optimizer=optax.adamw(1e-3), remat="full", interleave=chunks, **how
        ).verify()
        estimate, proof = planned.estimate, planned.proof
        assert estimate is not None
        assert proof is not None
        print(
            f"{mesh} microbatches={microbatches} interleave={chunks} layers={layers} rows={rows}: estimated "
            f"{estimate.peak_bytes / 2**20:.0f} MiB, compiled {proof.peak_bytes / 2**20:.0f} MiB, "
            f"{estimate.peak_bytes / proof.peak_bytes - 1:+.1%}",
            flush=True,
        )
        of_stages = {name for name in (*estimate.time, *proof.time) if name.endswith("/stage")}
        for name in sorted(of_stages):
            pair = estimate.time.get(name, 0.0), proof.time.get(name, 0.0)
            print(f"  {name}: {pair[0] * 1e3:.4f} ms, compiled {pair[1] * 1e3:.4f} ms")


def ways() -> None:
    """Print the memory and the step of each way to work 4 stages through, estimated and as compiled."""
    for topology, schedule, again in itertools.product(("v5p:2x2x1", "h100:4"), SCHEDULES, (True, False)):
        how = {"topology": topology, "mesh": {"stage": 4}, "names": NAMES, "microbatches": 8, "interleave": 1}
        how |= {"schedule": schedule, "stage_remat": again, "remat": "full" if again else "dots"}
        params = jax.eval_shape(lambda: init(4096, 8))
        made = plan(loss_in_halves, params, batch(8 * 1024), optimizer=optax.adamw(1e-3), **how).verify()
        estimate, proof = made.estimate, made.proof
        assert estimate is not None
        assert proof is not None
        kind = f"{topology} {schedule}, {'run again' if again else 'kept over ticks'}"
        memory, took = (
            (estimate.peak_bytes, proof.peak_bytes),
            (estimate.step_seconds, proof.step_seconds),
        )
        print(
            f"{kind}: estimated {memory[0] / 2**20:.0f} MiB, compiled {memory[1] / 2**20:.0f} MiB, "
            f"{memory[0] / memory[1] - 1:+.1%}; {took[0] * 1e3:.0f} ms, compiled {took[1] * 1e3:.0f} ms, "
            f"{took[0] / took[1] - 1:+.1%}",
            flush=True,
        )


# How four stages may be worked through, each with two layers in a chunk.
HELD: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "interleaved": {"interleave": 2},
    "kept over ticks": {"stage_remat": False},
    "kept over ticks, of products": {"stage_remat": False, "remat": "dots"},
    "delayed": {"schedule": "delayed"},
    "delayed, kept over ticks": {"schedule": "delayed", "stage_remat": False},
    "two stacks": {"decoder": 8},
    "two stacks, interleaved": {"decoder": 16, "interleave": 2},
    "two stacks, kept over ticks": {"decoder": 8, "stage_remat": False},
    "two stacks, delayed": {"decoder": 8, "schedule": "delayed"},
}


def held() -> None:
    """Print the estimate over what the compiler for v5p says: of temporaries alone, and of the peak."""
    data = batch(8 * 512)
    for name, how in HELD.items():
        own = {"remat": "full", "interleave": 1, **how}
        layers, decoder = 8 * own["interleave"], own.pop("decoder", 0)
        build = functools.partial(init_two, decoder=decoder) if decoder else init
        params = jax.eval_shape(functools.partial(build, 4096, layers))
        function, names = (loss_of_two, OF_TWO) if decoder else (loss, NAMES)
        where = {"topology": "v5p:2x2x1", "mesh": {"stage": 4}, "names": names, "microbatches": 8}
        optimizer = optax.adamw(1e-3)
        made = declare(function, params, data, optimizer=optimizer, **where, **own)
        made = made.verify(function, params, data, optimizer)
        estimate, proof = made.estimate, made.proof
        assert estimate is not None
        assert proof is not None
        arguments = proof.memory["arguments"]
        pair = estimate.peak_bytes - arguments, proof.peak_bytes - arguments
        print(
            f"{name}: temporaries estimated {pair[0] / 2**20:.0f} MiB, compiled "
            f"{pair[1] / 2**20:.0f} MiB, {pair[0] / pair[1] - 1:+.1%}; peak "
            f"{estimate.peak_bytes / proof.peak_bytes - 1:+.1%} of {proof.peak_bytes / 2**20:.0f} MiB",
            flush=True,
        )


# A mesh, and how its stages are worked through.
WAYS = (
    ({"stage": 2, "data": 2}, {"microbatches": 4}),
    ({"stage": 4, "data": 2}, {"microbatches": 2, "remat": "full"}),
    ({"stage": 2, "fsdp": 2, "tensor": 2}, {"microbatches": 4, "interleave": 2}),
)


def models() -> None:
    """Print the errors of models that are written as others write them, scanned and in Python loops."""
    for name in MODELS:
        for scanned in (True, False):
            for mesh, how in WAYS:
                value, gradient = errors_of(name, scanned, mesh, **how)
                kind = f"{name}, {'scanned' if scanned else 'in a loop'}, {mesh} {how}"
                print(f"{kind}: loss {value:.1e}, gradient {gradient:.1e}", flush=True)


if __name__ == "__main__":
    COMMANDS = {"errors": errors, "memory": memory, "work": work, "stacks": stacks}
    COMMANDS |= {"price": price, "held": held, "ways": ways, "models": models}
    for name in sys.argv[1:] or ["errors", "memory", "work"]:
        COMMANDS[name]()
