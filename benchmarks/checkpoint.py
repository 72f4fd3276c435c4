"""What a save costs: `python benchmarks/checkpoint.py [--gigabytes 1] [--devices 8]`.

Prints, interleaved in one run and as medians:

- how long the training loop is held by a save (the call, and what the steps after it take beyond their
  usual time) against the copy of the same state to host memory;
- bytes a second to the disk against `dd` with fsync of as many bytes to the same folder.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from meshwright.runtime.checkpoint import Checkpoints

_SIDE = 4096
_STEPS_AFTER = 2


def main() -> None:
    """Run the benchmark and print one line for each round and the medians at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the state (default: 1)")
    parser.add_argument("--devices", type=int, default=8, help="simulated CPU devices (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)

    state = _make_state(options.gigabytes)
    size_bytes = sum(leaf.nbytes for leaf in state.values())
    scratch = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.directory))
    platform = jax.devices()[0].platform
    print(f"{size_bytes / 2**30:.2f} GiB over {jax.device_count()} {platform} devices, {scratch}")
    try:
        rounds = _measure(state, scratch, options.rounds)
    finally:
        shutil.rmtree(scratch)
    _report(rounds, size_bytes)


def _make_state(gigabytes: float) -> dict[str, jax.Array]:
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    make = jax.jit(lambda key: jax.random.normal(key, (_SIDE, _SIDE), jnp.float32), out_shardings=sharding)
    count = max(1, round(gigabytes * 2**30 / (4 * _SIDE**2)))
    return {f"w{i}": make(key) for i, key in enumerate(jax.random.split(jax.random.key(0), count))}


def _measure(state: dict[str, jax.Array], scratch: Path, count: int) -> list[dict[str, float]]:
    train = jax.jit(lambda s: jax.tree.map(lambda x: x * 1.0001, s), donate_argnums=0)
    rounds = []
    with Checkpoints(scratch / "checkpoints", keep_last=1) as checkpoints:
        checkpoints.prepare(state)
        for step in range(1, count + 2):
            record: dict[str, float] = {}
            state, usual = _timed_steps(train, state, 3)
            record["copy"] = _time_of(_to_host, state)
            record["call"] = checkpoints.save(2 * step, state, metadata={})
            state, after = _timed_steps(train, state, _STEPS_AFTER)
            checkpoints.wait()
            record["steps"] = sum(after) - _STEPS_AFTER * min(usual)
            record["held"] = record["call"] + record["steps"]
            record["disk"] = _time_of(_save_and_wait, checkpoints, 2 * step + 1, state)
            record["dd"] = _time_of(_dd, scratch / "dd", sum(x.nbytes for x in state.values()))
            if step > 1:  # in the first, memory and disk are cold
                rounds.append(record)
                print("  ".join(f"{name} {value:6.3f} s" for name, value in record.items()), flush=True)
    return rounds


def _timed_steps(train: Any, state: Any, count: int) -> tuple[Any, list[float]]:
    seconds = []
    for _ in range(count):
        begun = time.perf_counter()
        state = jax.block_until_ready(train(state))
        seconds.append(time.perf_counter() - begun)
    return state, seconds


def _time_of(work: Callable[..., Any], *arguments: Any) -> float:
    begun = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begun


def _save_and_wait(checkpoints: Checkpoints, step: int, state: dict[str, jax.Array]) -> None:
    checkpoints.save(step, state, metadata={})
    checkpoints.wait()


def _to_host(state: dict[str, jax.Array]) -> list[np.ndarray]:
    return [np.array(shard.data) for leaf in state.values() for shard in leaf.addressable_shards]


def _dd(path: Path, size_bytes: int) -> None:
    block = 2**24
    amount = [f"bs={block}", f"count={size_bytes // block}"]
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={path}", *amount, "conv=fsync"], check=True, capture_output=True
    )
    path.unlink()


def _report(rounds: list[dict[str, float]], size_bytes: int) -> None:
    held = statistics.median(record["held"] / record["copy"] for record in rounds)
    speed = statistics.median(record["dd"] / record["disk"] for record in rounds)
    rate = {name: size_bytes / statistics.median(r[name] for r in rounds) / 1e9 for name in ("disk", "dd")}
    print(f"held by a save / copy to host memory: {held:.2f} (goal: at most 1.10)")
    print(f"steps after a save beyond usual: {statistics.median(r['steps'] for r in rounds):.3f} s")
    print(
        f"save to disk / dd with fsync: {speed:.2f} of its bytes a second "
        f"({rate['disk']:.2f} and {rate['dd']:.2f} GB/s; goal: at least 0.80)"
    )


if __name__ == "__main__":
    main()
