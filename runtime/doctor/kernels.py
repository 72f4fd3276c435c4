"""Kernels of attention on the attached device, held against plain attention in float32; the outcome is kept.

``python -m meshwright.runtime.doctor.kernels KERNEL`` compares one, in a process of its own: a kernel that
is wrong on a GPU can end the process.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ...sharding import Topology, declare
from ...sharding.errors import UserError
from ...sharding.files import user_cache, write_whole
from ...sharding.hardware.attached import attached_accelerators
from ...sharding.ops import attention
from ...sharding.ops.cudnn import library_version
from ...sharding.ops.kernels import kernel_facts
from ...sharding.processes import run
from .check import Check

# Heads, heads of keys, width of queries and keys, width of values.
SHAPES = ((16, 16, 64, 64), (16, 4, 128, 128), (16, 1, 128, 128), (16, 16, 192, 128), (8, 4, 256, 256))
# A kernel may be wrong by so many times what plain attention in bfloat16 is (gradients that XLA adds up of
# four chunks are by 2.2 times), and no less than half a step of bfloat16 at the largest value. A token too
# many or too few is a hundred times as much.
_TIMES, _LEAST = 4.0, 2.0**-9
_MOST = 16
_FILE = "kernels.json"
_MODULE = "meshwright.runtime.doctor.kernels"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """One comparison: the largest error of values and gradients over bfloat16's own, or why there is none."""

    shape: tuple[int, ...]
    layout: str
    worst: float | None = None
    why: str | None = None
    refused: bool = False
    """Whether a plan leaves such a call to XLA."""

    @property
    def passed(self) -> bool:
        """Whether everything was within the bound; a NaN is not."""
        return self.worst is not None and self.worst <= _TIMES


def compare_kernels(*, timeout_seconds: float = 300.0) -> Iterator[Check]:
    """Compare each kernel that the attached device may have, and keep the outcome for later plans.

    JAX is started in children alone: a process that holds a GPU leaves no memory to another.
    """
    lines, failure = _asked("here", timeout_seconds)
    if failure is not None:
        yield Check(name="kernels", value=failure, status="bad")
        return
    platform, here = lines[0]["platform"], lines[0]["here"]
    yield Check(name="kernels compared on", value=here or f"{platform}: XLA alone")
    mine = [name for name, facts in kernel_facts().items() if platform in facts["platforms"] and here]
    found: dict[str, bool] = {}
    names = ("xla", *mine)
    # Most of a comparison is compiling, which a processor does beside the others.
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        for name, (lines, failure) in zip(
            names, pool.map(lambda name: _asked(name, timeout_seconds), names), strict=True
        ):
            cases = [Compared(**line) for line in lines if not line["refused"]]
            found[name] = bool(cases) and all(case.passed for case in cases)
            yield _check(name, cases, failure)
    if here is not None:
        with contextlib.suppress(OSError):
            user_cache().mkdir(parents=True, exist_ok=True)
            write_whole(user_cache() / _FILE, json.dumps({**_read(), here: found}, indent=1))
    for name in kernel_facts().keys() - {*mine}:
        where = ", ".join(kernel_facts()[name]["platforms"]).replace(", cpu", "")
        yield Check(name=f"attention by {name}", value=f"not compared: it is for a {where}, and none is here")


def compared() -> tuple[str, ...]:
    """Return the kernels that this machine's device, with what is installed, was found to be right with.

    JAX is started only where something was kept and an accelerator is attached.
    """
    kept = _read()
    here = _here() if kept and attached_accelerators() else None
    return () if here is None else tuple(name for name, passed in kept.get(here, {}).items() if passed)


def _here() -> str | None:
    """Return what an outcome holds for: the device and what computes on it; None on a CPU."""
    import jax

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return None
    parts = [device.device_kind, f"jax {jax.__version__}"]
    if device.platform == "gpu":
        parts.append(f"cuDNN {library_version()}")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        parts.append(f"tokamax {importlib.metadata.version('tokamax')}")
    return ", ".join(parts)


def _read() -> dict[str, dict[str, bool]]:
    try:
        return dict(json.loads((user_cache() / _FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _check(name: str, cases: list[Compared], failure: str | None) -> Check:
    title = f"attention by {name}"
    if failure is not None:
        return Check(name=title, value=failure, status="bad", advice="plans leave it out unless it is named")
    if not cases:
        return Check(name=title, value="none of these calls is for it on this device")
    good = [case for case in cases if case.passed]
    worst = max((case.worst for case in good if case.worst is not None), default=0.0)
    value = f"{len(good)} of {len(cases)} within {_TIMES:g} times bfloat16's own error, worst {worst:.2f}"
    if len(good) == len(cases):
        advice = (
            "attention=auto takes it for packed rows here"
            if kernel_facts().get(name, {}).get("packs")
            else ""
        )
        return Check(name=title, value=value, advice=advice)
    bad = next(case for case in cases if not case.passed)
    shape = "x".join(map(str, bad.shape))
    why = bad.why or ("not a number" if bad.worst is None else f"{bad.worst:.1f} times")
    return Check(name=title, value=value, status="bad", advice=f"heads {shape}, {bad.layout}: {why}")


def _asked(what: str, timeout_seconds: float) -> tuple[list[dict[str, Any]], str | None]:
    """Return what a child printed of a kernel, or of the device (``here``); or why it printed nothing."""
    try:
        done = run([sys.executable, "-m", _MODULE, what], timeout_seconds=timeout_seconds)
    except subprocess.TimeoutExpired:
        return [], f"no answer within {timeout_seconds:g} s"
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode == 0 and lines:
        return lines, None
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return [], (said or [f"the process ended with {done.returncode}"])[-1][:200]


def compare(kernel: str, shapes: Sequence[tuple[int, ...]] = SHAPES) -> Iterator[Compared]:
    """Compare `kernel`, or ``xla``, in `shapes` and four layouts of segments on the first device."""
    import jax

    on_cpu = jax.devices()[0].platform == "cpu"
    sequence = 256 if on_cpu else 1024
    for shape in shapes:
        # Few heads where a CPU computes.
        heads = (shape[0] // 4, max(1, shape[1] // 4), *shape[2:]) if on_cpu else shape
        worst_of = None
        for layout, ids in layouts(sequence).items():
            try:
                worst_of = worst_of or _comparison(kernel, heads, sequence)
                yield Compared(shape=heads, layout=layout, worst=worst_of(ids))
            except UserError as error:
                yield Compared(shape=heads, layout=layout, why=str(error), refused=True)
            except Exception as error:  # whatever a library raises is an answer about this kernel
                message = " ".join(str(error).split())
                yield Compared(shape=heads, layout=layout, why=f"{type(error).__name__}: {message}"[:200])


def layouts(sequence: int) -> Mapping[str, Any]:
    """Return segment ids int32 ``[2, sequence]``: one, many, padding behind, and as many as there may be."""
    import numpy as np

    def rows(*lengths: int, padding: int = 0) -> Any:
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        return np.concatenate([ids, np.zeros(padding, int)])[:sequence]

    eighth = sequence // 8
    found = {
        "one segment": [rows(sequence)] * 2,
        "many": [rows(*[eighth] * 8), rows(3 * eighth + 5, eighth - 5, 4 * eighth)],
        "padding at the end": [
            rows(3 * eighth + 1, eighth, padding=4 * eighth - 1),
            rows(0, padding=sequence),
        ],
        "as many as may be": [
            rows(*[1] * (_MOST - 1), sequence - _MOST + 1),
            rows(*[sequence // _MOST] * _MOST),
        ],
    }
    return {name: np.stack(pair).astype(np.int32) for name, pair in found.items()}


def _comparison(kernel: str, shape: tuple[int, ...], sequence: int) -> Callable[[Any], float | None]:
    """Return a function of segment ids, to the largest error over plain attention's in bfloat16.

    Of the result and its gradients, both against plain attention in float32. None stands for something that
    is not a number.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    heads, kv_heads, wide, value_wide = shape
    sizes = {"query": (heads, wide), "key": (kv_heads, wide), "value": (kv_heads, value_wide)}
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        name: jax.random.normal(key, (sequence, *size), jnp.bfloat16)
        for (name, size), key in zip(sizes.items(), keys, strict=False)
    }
    weights = jax.random.normal(keys[3], (2, sequence, heads, value_wide), jnp.float32)
    # Powers of two, by which both rows are other numbers, and exact in bfloat16.
    scales = jnp.array([1.0, -0.5])

    def of(chunk: int, params: Any, batch: Any) -> Any:
        arrays = {
            name: leaf[None] * batch["scales"][:, None, None, None].astype(leaf.dtype)
            for name, leaf in params.items()
        }
        out = attention(**arrays, segment_ids=batch["ids"], chunk=chunk)
        return (out.astype(jnp.float32) * batch["weights"]).sum(), out

    def loss(params: Any, batch: Any) -> Any:
        return of(sequence // 4 if kernel == "xla" else sequence, params, batch)

    def plain(params: Any, batch: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return of(sequence, params, batch)

    def data(ids: Any) -> dict[str, Any]:
        return {"ids": jnp.asarray(ids), "weights": weights, "scales": scales}

    def results(function: Any, params: Any, ids: Any) -> Any:
        (_, out), gradients = function(params, data(ids))
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (out, gradients))

    whole = np.ones((2, sequence), np.int32)
    plan = declare(
        loss,
        params,
        data(whole),
        topology=Topology.of(jax.devices()[:1]),
        mesh={"data": 1},
        attention=kernel,
        segments=_MOST,
    )
    # Values are asked for, not speed: products are not tuned.
    options = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else None
    by_kernel, by_xla = (
        jax.jit(jax.value_and_grad(function, has_aux=True), compiler_options=options)
        for function in (plan.apply(loss, plan.make_mesh()), plain)
    )

    def worst_of(ids: Any) -> float | None:
        exact = results(by_xla, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), ids)
        rounded, found = results(by_xla, params, ids), results(by_kernel, params, ids)
        worst = 0.0
        for one, own, right in zip(*map(jax.tree.leaves, (found, rounded, exact)), strict=True):
            largest = float(np.abs(right).max()) or 1.0
            usual = max(float(np.abs(own - right).max()) / largest, _LEAST)
            error = float(np.abs(one - right).max()) / largest / usual
            if not np.isfinite(error):
                return None
            worst = max(worst, error)
        return worst

    return worst_of


def _main(what: str) -> None:
    # Several are at work at once, and each needs little.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    if what == "here":
        print(json.dumps({"platform": jax.local_devices()[0].platform, "here": _here()}))
        return
    for case in compare(what):
        print(json.dumps(dataclasses.asdict(case)), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
