"""Facts of sharding/xla/quirks.toml, seen again: `python benchmarks/quirks.py [--only WORD]`.

Small programs are compiled by the compilers that are installed here, for slices that are not, each slice in a
process of its own. Printed are the facts that they show beside those recorded, and what a row would have to
say; the exit code is 1 if a value would change. Facts that no small program shows come last, with their rows'
word of how they were seen.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshwright.sharding import Topology, make_mesh
from meshwright.sharding.compiled.roofline import host_bytes
from meshwright.sharding.hlo.text import parse_hlo
from meshwright.sharding.processes import run
from meshwright.sharding.verify.verify import environment
from meshwright.sharding.xla.compiler import compiler_of, quirks
from meshwright.sharding.xla.targets import describe, missing
from meshwright.sharding.xla.versions import versions

TOPOLOGIES = (
    *("v4:4x4x4", "v5e:16x16", "v5p:4x4x4", "v6e:16x16", "tpu7x:4x4x4"),
    *("a100:8", "h100:8", "b200:8", "cpu:8"),
)
_LIMIT_SECONDS = 300.0
_WIDTH = 4096


def _array(axes: Mapping[str, int], topology: Topology, spec: P, rows: int = _WIDTH) -> jax.ShapeDtypeStruct:
    """Return a bfloat16 matrix on all devices of a slice that is described, or simulated if it is of CPUs."""
    devices = jax.devices() if topology.chip.platform == "cpu" else describe(topology).devices
    sharding = NamedSharding(make_mesh(axes, topology, devices=devices), spec)
    return jax.ShapeDtypeStruct((rows, _WIDTH), jnp.bfloat16, sharding=sharding)


def _compiled(function: Callable[..., object], *arrays: jax.ShapeDtypeStruct) -> str:
    return jax.jit(function).lower(*arrays).compile().as_text() or ""


def tile_rows(topology: Topology) -> int:
    """Return the rows of the tiles that a bfloat16 matrix lies in: of ``T(8,128)(2,1)`` 8 x 2; else 1."""
    matrix = _array({"fsdp": topology.num_devices}, topology, P())
    layout = re.search(rf"bf16\[{_WIDTH},{_WIDTH}\]{{1,0:T([(),\d]+)", _compiled(jnp.matmul, matrix, matrix))
    return 1 if layout is None else math.prod(int(rows) for rows in re.findall(r"\((\d+)", layout[1]))


def _scattered(topology: Topology, axes: Mapping[str, int]) -> tuple[set[str], str]:
    """Return the kinds and shapes of reductions of a sum in float32, cast and scattered over ``fsdp``."""
    rows = _array(axes, topology, P("fsdp"), rows=8 * topology.num_devices)

    def scatter(x: jax.Array, y: jax.Array) -> jax.Array:
        total = jnp.matmul(x.T, y, preferred_element_type=jnp.float32).astype(jnp.bfloat16)
        return jax.lax.with_sharding_constraint(total, rows.sharding).astype(jnp.float32)

    instructions = parse_hlo(_compiled(scatter, rows, rows)).instructions.values()
    found = [one for one in instructions if one.collective is not None]
    return {one.collective.kind for one in found if one.collective}, " ".join(one.shape for one in found)


def scatters_planes(topology: Topology) -> bool:
    """Return whether sums are scattered over two torus axes, and over three all-reduced."""
    if len(topology.shape) < 3:
        return False
    depth = topology.shape[-1]
    plane, _ = _scattered(topology, {"tensor": depth, "fsdp": topology.num_devices // depth})
    whole, _ = _scattered(topology, {"fsdp": topology.num_devices})
    # A reduce-scatter is a fusion of that name around an all-reduce and a slice.
    return "reduce_scatter" in plane and "reduce_scatter" not in whole


def reduces_cast(topology: Topology) -> bool:
    """Return whether a sum that is cast to bfloat16 is reduced in it over devices."""
    _, shapes = _scattered(topology, {"fsdp": topology.num_devices})
    return "f32[" not in shapes


def gathers_copy(topology: Topology) -> bool:
    """Return whether an array that is given up is copied first where what is gathered takes its place."""
    whole = _array({"data": topology.num_devices}, topology, P())
    cut = whole.update(sharding=NamedSharding(whole.sharding.mesh, P("data")))

    def add(x: jax.Array, y: jax.Array) -> jax.Array:
        part = jax.lax.with_sharding_constraint(x, cut.sharding) + y
        return jax.lax.with_sharding_constraint(part, whole.sharding)

    text = jax.jit(add, donate_argnums=0).lower(whole, cut).compile().as_text() or ""
    copies = (one for one in parse_hlo(text).instructions.values() if one.opcode == "copy")
    return any(f"[{_WIDTH},{_WIDTH}]" in one.shape for one in copies)


def host_is_device(topology: Topology) -> bool:
    """Return whether the compiler's figures count an argument on the host among those on the device."""
    here = _array({"fsdp": topology.num_devices}, topology, P())
    there = here.update(sharding=here.sharding.with_memory_kind("pinned_host"))
    outputs = here.sharding, there.sharding
    program = jax.jit(lambda x, y: (x * 2, y), out_shardings=outputs).lower(here, there)
    sizes = program.compile().memory_analysis()
    return sizes is not None and sizes.host_argument_size_in_bytes == 0


def schedules_within(topology: Topology) -> float:
    """Return the share of a GPU's memory beyond which its compiler runs again what could be kept.

    Of a chain of layers whose values take three quarters of it: 0.8 if they are run again with 95 % of that
    share and not with 112 %, else 1. Other chips' compilers are not asked.
    """
    size = topology.chip.hbm_bytes
    if topology.chip.platform != "gpu" or size is None:
        return 1.0
    rows, layers = int(0.78 * size / (_WIDTH * 2 * 27)), 12
    given = _array({"data": topology.num_devices}, topology, P(), rows=rows)
    matrices = given.update(shape=(layers * _WIDTH, _WIDTH))

    def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            return jnp.sin(x @ weight), None

        return (jax.lax.scan(layer, x, weights.reshape(layers, _WIDTH, _WIDTH))[0] ** 2).mean()

    lowered = jax.jit(jax.grad(loss)).lower(matrices, given)

    def runs_again(factor: int) -> bool:
        program = lowered.compile(compiler_options={"xla_gpu_memory_limit_slop_factor": factor})
        return ".remat" in (program.as_text() or "")

    return 0.8 if runs_again(95) and not runs_again(112) else 1.0


def host_rate(topology: Topology) -> float | None:
    """Return the bytes a second, to one digit, of what comes from the host by the work that is beside it.

    Of a matrix that the link needs 60 products for, beside 64 of them; None where no work is left out.
    """
    chip = topology.chip
    link, peak = chip.host_link_bytes_per_second_per_chip, chip.peak_flops("bfloat16")
    if not topology.is_torus or link is None or peak is None or not chip.clock_hz:
        return None
    each = 2.0 * 1024 * _WIDTH**2 / peak
    matrix = _array({"data": topology.num_devices}, topology, P())
    near = matrix.sharding
    far = matrix.update(
        shape=(int(60 * each * link / (2 * _WIDTH)) // 256 * 256, _WIDTH),
        sharding=near.with_memory_kind("pinned_host"),
    )

    def beside(far: jax.Array, x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        for _ in range(64):
            x = jnp.tanh(x @ matrix)
        return x, jax.device_put(far, near) @ matrix

    module = parse_hlo(_compiled(beside, far, matrix.update(shape=(1024, _WIDTH)), matrix))
    cycles, begun, start, moved = 0.0, "", 0.0, 0.0
    for name in module.computations[module.entry].instructions:
        one = module.instructions[name]
        if (size := host_bytes(module, one)) > 0.0:
            begun, start, moved = name, cycles, size
        elif begun and begun in one.operands and one.opcode == "copy-done":
            rate = moved * chip.clock_hz / max(cycles - start, 1.0)
            return float(f"{rate:.0e}") if rate > link else None
        found = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
        cycles += float(found[1]) if found else 0.0
    return None


def one_ring(topology: Topology) -> bool:
    """Return whether a gather over half of one torus axis and all of the others is one ring through them."""
    if not topology.is_torus:
        return False
    rows = _array({"fsdp": topology.num_devices // 2, "tensor": 2}, topology, P("fsdp"))
    whole = NamedSharding(rows.sharding.mesh, P())
    return '"emitter":"1D' in _compiled(lambda x: 2 * jax.lax.with_sharding_constraint(x, whole), rows)


PROBES = {
    probe.__name__: probe
    for probe in (
        tile_rows,
        scatters_planes,
        reduces_cast,
        gathers_copy,
        host_is_device,
        schedules_within,
        host_rate,
        one_ring,
    )
}


def seen(topology: Topology) -> dict[str, bool | float | str]:
    """Compile in a process of its own and return fact → what is seen, or ``error`` → why there is nothing."""
    if topology.chip.platform != "cpu" and (reason := missing(topology)) is not None:
        return {"error": reason}
    command = [sys.executable, __file__, "--compile", str(topology)]
    done = run(command, timeout_seconds=_LIMIT_SECONDS, env={**os.environ, **environment(topology)})
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no word"]
    return json.loads(lines[-1]) if done.returncode == 0 else {"error": lines[-1]}


def advice(fact: str, topology: Topology, value: bool | float | None) -> str:
    """Return what a row would have to say of `value`; empty if the file says it."""
    compiler, chip = compiler_of(topology), topology.chip.name
    version = _version(topology)
    recorded = getattr(compiler, fact)
    rows = [
        row
        for row in quirks()[fact]
        if row["compiler"] == compiler.name and chip in row.get("chips", (chip,))
    ]
    if value != recorded:
        row = f'compiler = "{compiler.name}", chips = ["{chip}"], versions = ["{version}"]'
        return f"not {str(recorded).lower()} on {chip}: [[{fact}]] {row}, value = {str(value).lower()}"
    if rows and version not in rows[0]["versions"]:
        return f'[[{fact}]] of {compiler.name}: add "{version}" to versions'
    return ""


def _version(topology: Topology) -> str:
    found = versions(topology)
    return found["libtpu" if topology.is_torus else "jaxlib"]


def main() -> int:
    """Print what is seen, and return 1 if a recorded value is not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="topologies that contain this")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compile:
        topology = Topology.parse(given.compile)
        print(json.dumps({name: probe(topology) for name, probe in PROBES.items()}))
        return 0
    changes: list[str] = []
    differs = False
    for topology in map(Topology.parse, TOPOLOGIES):
        if given.only not in str(topology):
            continue
        found = seen(topology)
        if "error" in found:
            print(f"{topology!s:12} {found['error']}")
            continue
        print(f"{topology!s:12} {compiler_of(topology).name} {_version(topology)}")
        for fact, value in found.items():
            recorded = getattr(compiler_of(topology), fact)
            differs |= value != recorded
            print(f"  {fact:18} {value!s:6} {'as recorded' if value == recorded else f'recorded {recorded}'}")
            changes.append(advice(fact, topology, value))
    for line in dict.fromkeys(filter(None, changes)):
        print(line)
    for fact, rows in quirks().items():
        for row in rows if fact not in PROBES else ():
            print(f"{fact} of {row['compiler']}: no small program shows it; {row['seen'].splitlines()[0]}")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
