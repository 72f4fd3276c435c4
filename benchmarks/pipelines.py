"""Pipelines: errors of loss and gradients, collectives in and outside of loops, peaks, executed work.

    python benchmarks/pipelines.py [errors] [memory] [work]

On simulated devices, with a loss of its own: a packed decoder without attention, whose table is tied.
"""

from __future__ import annotations

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
from meshwright.sharding import declare
from meshwright.sharding.compiled.flops import flops
from meshwright.sharding.hlo.loops import loops, run_counts
from meshwright.sharding.hlo.text import parse_hlo

LAYERS, WIDTH, VOCAB, TIME = 8, 32, 64, 16
NAMES = {
    "blocks": {"up": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed")},
    "table": ("vocab", "embed"),
}


def init(width: int = WIDTH) -> Any:
    keys = jax.random.split(jax.random.key(0), 3)
    up = jax.random.normal(keys[0], (LAYERS, width, 4 * width)) / width**0.5
    down = jax.random.normal(keys[1], (LAYERS, 4 * width, width)) / (2 * width**0.5)
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


MESHES = (
    {"stage": 2},
    {"stage": 4, "data": 2},
    {"stage": 2, "data": 2, "fsdp": 2},
    {"stage": 2, "data": 2, "tensor": 2},
)


def compiled(
    mesh: dict[str, int], microbatches: int, rows: int, width: int = WIDTH, remat: str = "full"
) -> Any:
    count = int(np.prod(list(mesh.values())))
    params, data = init(width), batch(rows)
    how = {"topology": f"cpu:{count}", "mesh": mesh, "names": NAMES, "microbatches": microbatches}
    plan = declare(loss, params, data, remat=remat, **how)
    devices = plan.make_mesh(devices=jax.devices()[:count])
    where = plan.shardings(params, devices), plan.shardings(data, devices, "batch")
    args = jax.device_put((params, data), where)
    return jax.jit(jax.value_and_grad(plan.apply(loss, mesh=devices))).lower(*args).compile(), args


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
    for mesh in MESHES:
        for microbatches in (2, 4, 8):
            rows = 8 * microbatches * mesh["stage"]
            program, args = compiled(mesh, microbatches, rows)
            value, slopes = jax.device_get(program(*args))
            wanted, plain = jax.value_and_grad(loss)(init(), batch(rows))
            pairs = zip(jax.tree.leaves(slopes), jax.tree.leaves(plain), strict=True)
            worst = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
            apart = abs(float(value - wanted) / float(wanted))
            said = f"{mesh} microbatches={microbatches}: loss {apart:.1e}, gradient {worst:.1e};"
            print(said, *counted(program))


def memory() -> None:
    """Print the compiled temporaries of 8 to 128 microbatches of the same rows each."""
    for mesh in ({"stage": 4}, {"stage": 2, "data": 2}):
        held = [
            compiled(mesh, count, count * 8, width=64)[0].memory_analysis().temp_size_in_bytes
            for count in (8, 32, 128)
        ]
        print(
            f"{mesh}: temporaries of 8, 32 and 128 microbatches {[f'{one / 2**20:.2f} MiB' for one in held]}"
        )


def executed(program: Any) -> float:
    """Return the FLOPs of the products that a device executes in a compiled step."""
    module = parse_hlo(program.as_text())
    runs = run_counts(module, loops(module), lambda conditional: "")
    known = [one for one in module.instructions.values() if one.computation in runs]
    return sum(runs[one.computation] * flops(module, one) for one in known)


def work() -> None:
    """Print the work of layers executed over needed, by the formula 1 + (p - 1) / M.

    Needed are two products of a layer forward, two made again by its stage and four of gradients; three of
    the head. Layers that are rematerialised beside are made a third time.
    """
    for stages, microbatches in ((2, 8), (4, 8), (4, 16)):
        program, _ = compiled({"stage": stages}, microbatches, microbatches * 8, remat="none")
        tokens = 8 * microbatches * TIME
        needed = 8 * (LAYERS / stages) * 2 * tokens * WIDTH * 4 * WIDTH
        head = 3 * 2 * tokens * WIDTH * VOCAB / stages
        share = (executed(program) - head) / needed
        formula = 1 + (stages - 1) / microbatches
        print(f"stage={stages} microbatches={microbatches}: {share:.3f}, by the formula {formula:.3f}")


if __name__ == "__main__":
    for name in sys.argv[1:] or ["errors", "memory", "work"]:
        {"errors": errors, "memory": memory, "work": work}[name]()
