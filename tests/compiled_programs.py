"""Small programs whose collectives can be written down, through the real compilers of absent chips.

`texts` compiles in a child process, one a compiler, and keeps what came out for the session. Its
arguments are ``OUTPUT [schedules] TOPOLOGY/axis=size,…/program[,program…]``.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forks import forked

if TYPE_CHECKING:
    from meshwright.sharding.plans.proof import Proof

_HERE = str(pathlib.Path(__file__).parent)
_CHILD = "import sys, compiled_programs; compiled_programs._main(*sys.argv[1:])"
ROWS, COLUMNS = 1024, 1024
LAYERS, WIDTH, HIDDEN, BATCH = 4, 512, 2048, 512
LARGE = 4096
STEPS = 3
SEQUENCE, EMBED, MLP = 4096, 4096, 16384


@dataclass(frozen=True)
class Compiled:
    """The text of an optimised program, its schedules, and the compiler's own figures for its memory."""

    text: str
    topology: str
    mesh: dict[str, int]
    memory: dict[str, float]
    bundles: dict[str, int]

    @property
    def peak_bytes(self) -> float:
        return self.memory["peak_memory_in_bytes"]

    def proof(self, **others: Any) -> Proof:
        """Return what is read of it; `others` as `read_proof` takes them."""
        from meshwright.sharding import Topology
        from meshwright.sharding.compiled.read import read_proof

        return read_proof(
            self.text,
            topology=Topology.parse(self.topology),
            mesh=self.mesh,
            peak_bytes=self.peak_bytes,
            memory={},
            compile_seconds=0.0,
            versions={},
            **others,
        )


@functools.cache
def texts(*specs: str, schedules: bool = False) -> dict[str, Compiled]:
    """Return ``topology/program`` → what came of it, for each ``topology/mesh/programs``.

    To have the `schedules` written takes libtpu longer than to compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            forked([sys.executable, "-c", _CHILD, folder, *(["schedules"] if schedules else []), *specs]),
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": _HERE},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found = {}
        for path in pathlib.Path(folder).glob("*.json"):
            record = json.loads(path.read_text())
            name = record.pop("name")
            found[name] = Compiled(text=path.with_suffix(".hlo").read_text(), **record)
        return found


def _programs(mesh: Any) -> dict[str, Callable[[], Any]]:
    """Return name → what lowers the program on `mesh`; collectives run over its last axis."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    axes = mesh.axis_names
    last, rest = axes[-1], axes[:-1]
    size = mesh.shape[last]

    def array(shape: tuple[int, ...], *spec: Any, dtype: Any = jnp.bfloat16, kind: str | None = None) -> Any:
        sharding = NamedSharding(mesh, P(*spec), **({"memory_kind": kind} if kind else {}))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def collective(function: Callable[..., Any], taken: Any, given: Any) -> Callable[[], Any]:
        shape = (ROWS * (mesh.size if taken == P(axes) else mesh.size // size), COLUMNS)

        def program(x: Any) -> Any:
            return jax.shard_map(function, mesh=mesh, in_specs=taken, out_specs=given, check_vma=False)(x)

        return lambda: jax.jit(program).lower(array(shape, *taken))

    def perceptron() -> Any:
        """One gradient step of two layers, parameters in shards over the last axis, by hand."""

        def loss(weights: Any, x: Any) -> Any:
            first, second = (jax.lax.all_gather(w, last, axis=0, tiled=True) for w in weights)
            y = jax.nn.relu(x @ first) @ second
            return jnp.sum(y.astype(jnp.float32) ** 2)

        def step(weights: Any, x: Any) -> Any:
            value, slopes = jax.value_and_grad(loss)(weights, x)
            return jax.lax.psum(value, axes), [w - s for w, s in zip(weights, slopes, strict=True)]

        spec = [P(last), P(last)]
        mapped = jax.shard_map(
            step, mesh=mesh, in_specs=(spec, P(axes)), out_specs=(P(), spec), check_vma=False
        )
        weights = [array((WIDTH, HIDDEN), last), array((HIDDEN, WIDTH), last)]
        return jax.jit(mapped, donate_argnums=0).lower(weights, array((BATCH * mesh.size, WIDTH), axes))

    def nested() -> Any:
        """STEPS turns of LAYERS turns, with one all-reduce in the inner and one in the outer loop."""

        def inner(x: Any, w: Any) -> Any:
            return jax.lax.psum(x @ w, last), None

        def outer(_: Any, carry: Any) -> Any:
            x, weights = carry
            x, _ = jax.lax.scan(inner, x, weights)
            return jnp.tanh(x + jax.lax.pmean(x[:, ::-1] * 2, last)), weights

        def program(x: Any, weights: Any) -> Any:
            return jax.lax.fori_loop(0, STEPS, outer, (x, weights))[0]

        mapped = jax.shard_map(
            program, mesh=mesh, in_specs=(P(rest or None), P()), out_specs=P(rest or None), check_vma=False
        )
        x = array((BATCH * (mesh.size // size), WIDTH), rest or None)
        return jax.jit(mapped).lower(x, array((LAYERS, WIDTH, WIDTH)))

    def endless() -> Any:
        """A loop whose end depends on its data."""

        def program(x: Any) -> Any:
            return jax.lax.while_loop(
                lambda x: jnp.sum(x.astype(jnp.float32)) < 1e3, lambda x: jnp.sin(x @ x) * 2, x
            )

        return jax.jit(program).lower(array((WIDTH, WIDTH)))

    def product() -> Any:
        return jax.jit(lambda a, b: a @ b).lower(array((LARGE, LARGE)), array((LARGE, LARGE)))

    def scaled(dtype: Any) -> Callable[[], Any]:
        """Elementwise work, which reads and writes one array."""
        return lambda: jax.jit(lambda x: x * 2 + 1).lower(array((LARGE, LARGE), dtype=dtype))

    def overlapped() -> Any:
        """A shift of `x` with products beside it that do not need it."""

        def program(x: Any, w: Any) -> Any:
            moved = jax.lax.ppermute(x, last, [(i, (i + 1) % size) for i in range(size)])
            y = x
            for _ in range(8):
                y = jnp.tanh(y @ w)
            return moved + y

        mapped = jax.shard_map(
            program, mesh=mesh, in_specs=(P(axes), P()), out_specs=P(axes), check_vma=False
        )
        return jax.jit(mapped).lower(array((4096 * mesh.size, 2048), axes), array((2048, 2048)))

    def zeros() -> Any:
        """A shard put into zeros and summed over the devices: an all-gather in disguise."""

        def program(x: Any) -> Any:
            whole = jnp.zeros((ROWS * size, COLUMNS), x.dtype)
            start = jax.lax.axis_index(last) * ROWS
            return jax.lax.psum(jax.lax.dynamic_update_slice(whole, x, (start, 0)), last)

        return collective(program, P(axes), P(rest or None))()

    def sliced() -> Any:
        """A sum of which each device keeps its own rows."""

        def program(x: Any) -> Any:
            whole = jax.lax.psum(x, last)
            start = jax.lax.axis_index(last) * (ROWS // size)
            return jax.lax.dynamic_slice(whole, (start, 0), (ROWS // size, COLUMNS))

        return collective(program, P(rest or None), P(axes))()

    def replicated() -> Any:
        """An array gathered whole, of which each device then takes other columns."""

        def program(x: Any) -> Any:
            whole = jax.lax.all_gather(x, last, tiled=True)
            start = jax.lax.axis_index(last) * (COLUMNS // size)
            return jax.lax.dynamic_slice(whole, (0, start), (ROWS * size, COLUMNS // size))

        return collective(program, P(axes), P(rest or None, last))()

    def padded() -> Any:
        """Rows of three, which tiles fill up to 128."""
        return jax.jit(lambda x: jnp.tanh(x).reshape(-1, 3) + 1).lower(
            array((2**18, 3), axes, dtype=jnp.float32)
        )

    def offloaded() -> Any:
        """A scan that keeps its carry on the host."""
        from jax.ad_checkpoint import checkpoint_name

        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["carried"],
            offload_src="device",
            offload_dst="pinned_host",
        )

        def layer(x: Any, w: Any) -> Any:
            return jnp.tanh(checkpoint_name(x, "carried") @ w), None

        def loss(weights: Any, x: Any) -> Any:
            y, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy), x, weights)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss)).lower(
            array((LAYERS, 1024, 1024)), array((4096 * mesh.size, 1024), axes)
        )

    def carried() -> Any:
        """The gradients of a product: one is scattered while it is made, the other needs `x` whole.

        The gather of `x` goes on beside the turns of the loop that makes the first.
        """
        first = axes[0]

        def program(x: Any, w: Any, slope: Any) -> Any:
            def project(x: Any, w: Any) -> Any:
                y = jnp.einsum("bse,em->bsm", x, w)
                return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P(first, None, last)))

            of_x, of_w = jax.vjp(project, x, w)[1](slope)
            return jax.lax.with_sharding_constraint(of_x, NamedSharding(mesh, P(first, last))), of_w

        rows = 4 * mesh.shape[first]
        return jax.jit(program).lower(
            array((rows, SEQUENCE, EMBED), first, last),
            array((EMBED, MLP), None, last),
            array((rows, SEQUENCE, MLP), first, None, last),
        )

    turned = [(i, (i + 1) % size) for i in range(size)]
    return {
        "all_gather": collective(lambda x: jax.lax.all_gather(x, last, tiled=True), P(axes), P(rest or None)),
        "all_reduce": collective(lambda x: jax.lax.psum(x, last), P(axes), P(rest or None)),
        "reduce_scatter": collective(
            lambda x: jax.lax.psum_scatter(x, last, tiled=True), P(rest or None), P(axes)
        ),
        "all_to_all": collective(
            lambda x: jax.lax.all_to_all(x, last, 0, 1, tiled=True), P(axes), P(rest or None, last)
        ),
        "collective_permute": collective(lambda x: jax.lax.ppermute(x, last, turned), P(axes), P(axes)),
        "perceptron": perceptron,
        "nested": nested,
        "endless": endless,
        "product": product,
        "scaled": scaled(jnp.bfloat16),
        "scaled_float32": scaled(jnp.float32),
        "overlapped": overlapped,
        "zeros": zeros,
        "sliced": sliced,
        "replicated": replicated,
        "padded": padded,
        "offloaded": offloaded,
        "carried": carried,
    }


# Program → options to compile it with: gathers inside of products.
_OPTIONS = {
    "carried": {
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
    }
}


def _main(folder: str, *specs: str) -> None:
    from meshwright.sharding import Topology
    from meshwright.sharding.compiled.schedule import dump_arguments, read_bundles
    from meshwright.sharding.hardware.mesh import make_mesh
    from meshwright.sharding.xla.targets import describe

    schedules = pathlib.Path(folder) / "schedules"
    if specs[0] == "schedules":
        specs = specs[1:]
        os.environ["LIBTPU_INIT_ARGS"] = dump_arguments(schedules)
    for number, spec in enumerate(specs):
        text, axes, wanted = spec.split("/")
        sizes = {name: int(size) for name, size in (axis.split("=") for axis in axes.split(","))}
        topology = Topology.parse(text)
        mesh = make_mesh(sizes, topology, devices=describe(topology).devices)
        programs = _programs(mesh)
        for name in wanted.split(","):
            shutil.rmtree(schedules, ignore_errors=True)
            schedules.mkdir()
            compiled = programs[name]().compile(compiler_options=_OPTIONS.get(name))
            sizes_of = compiled.memory_analysis()
            memory = {key: getattr(sizes_of, key) for key in dir(sizes_of) if key.endswith("_in_bytes")}
            path = pathlib.Path(folder) / f"{number}-{name}"
            path.with_suffix(".hlo").write_text(compiled.as_text())
            record = {"name": f"{text}/{name}", "topology": text, "mesh": sizes, "memory": memory}
            record["bundles"] = read_bundles(schedules)
            path.with_suffix(".json").write_text(json.dumps(record))
