"""Step time and CPU time of the training loop against bare JAX: the same model, layout and optimiser.

`python benchmarks/step_time.py [--rounds 5] [--steps 10]` runs both in turn, in two processes that wait for
each other, and prints the ratios of each round and their median.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any


def main() -> None:
    """Print the table, or be one of the two processes it is made of."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", choices=["bare", "meshwright"])
    arguments = parser.parse_args()
    if arguments.child:
        _serve(_bare() if arguments.child == "bare" else _meshwright())
        return
    rows = _interleave(arguments.rounds, arguments.steps)
    summary = {
        "wall_ratio": statistics.median(row["ours"][0] / row["bare"][0] for row in rows),
        "cpu_ratio": statistics.median(row["ours"][1] / row["bare"][1] for row in rows),
        "data_wait_share": max(row["ours"][2] / row["ours"][0] for row in rows),
        "rounds": rows,
    }
    if arguments.json:
        print(json.dumps(summary))
        return
    print(f"seconds a step ({arguments.steps} steps a round)\n")
    print("round   bare wall  ours wall  ratio    bare CPU   ours CPU  ratio")
    for number, row in enumerate(rows, 1):
        (bare, bare_cpu, _), (ours, ours_cpu, _) = row["bare"], row["ours"]
        wall = f"{bare:9.3f}  {ours:9.3f}  {ours / bare:5.3f}"
        print(f"{number:5}   {wall}   {bare_cpu:9.3f}  {ours_cpu:9.3f}  {ours_cpu / bare_cpu:5.3f}")
    print(f"\nmedian wall ratio {summary['wall_ratio']:.3f} (target 1.02)")
    print(f"median CPU ratio  {summary['cpu_ratio']:.3f} (target 1.03)")
    print(f"waiting for data  {summary['data_wait_share']:.3%} of step time at most (target 1 %)")


def _interleave(rounds: int, steps: int) -> list[dict[str, Any]]:
    children = {}
    for kind in ("bare", "meshwright"):
        command = [sys.executable, __file__, "--child", kind]
        children[kind] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        _ask(children[kind], 2)  # Compiles one after the other, and warms up.
    rows = []
    try:
        for number in range(rounds):
            order = ["bare", "meshwright"] if number % 2 == 0 else ["meshwright", "bare"]
            found = {kind: [value / steps for value in _ask(children[kind], steps)] for kind in order}
            rows.append({"bare": found["bare"], "ours": found["meshwright"]})
    finally:
        for child in children.values():
            assert child.stdin is not None
            child.stdin.close()
            child.wait(timeout=60)
    return rows


def _ask(child: subprocess.Popen[str], steps: int) -> list[float]:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{steps}\n")
    child.stdin.flush()
    return json.loads(child.stdout.readline())


def _serve(run: Any) -> None:
    """Run as many steps as each line of stdin says; answer wall, CPU and data-wait seconds."""
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), _cpu_seconds()
        waited = run(int(line))
        print(json.dumps([time.perf_counter() - wall, _cpu_seconds() - cpu, waited]), flush=True)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _bare() -> Any:
    sys.path.insert(0, os.path.dirname(__file__))
    import bare

    train = bare.trainer()

    def run(steps: int) -> float:
        train(steps)
        return 0.0

    return run


def _meshwright() -> Any:
    """Return a function that runs the real loop, with data, metrics and TensorBoard left as they are."""
    import contextlib
    import pathlib

    import jax
    from meshwright.runtime.checkpoint import Checkpoints
    from meshwright.runtime.config import parse
    from meshwright.runtime.faults import StepWatchdog, StopSignal
    from meshwright.runtime.hosts import initialize
    from meshwright.runtime.profiling import ProfileWindow
    from meshwright.runtime.train import build_job
    from meshwright.runtime.train.loop import TrainingLoop
    from meshwright.runtime.train.metrics import Collector, JsonLines, TensorBoard

    config = parse(CONFIG)
    initialize(config.hosts, simulated_devices=8)
    jax.config.update("jax_enable_compilation_cache", False)
    job = build_job(config)
    stack = contextlib.ExitStack()
    folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    update = job.step.update.lower(job.step.abstract_state, job.abstract_batch).compile()
    stop, watchdog = stack.enter_context(StopSignal()), stack.enter_context(StepWatchdog(600))
    state, step = job.step.init(jax.random.key(0)), 0
    waits = _Waits()
    sinks = [JsonLines(folder / "metrics.jsonl", 0), TensorBoard(folder / "tensorboard"), waits]

    class NoSaves(Checkpoints):
        """A round ends like a run, with a save, which is not what is measured here."""

        def prepare(self, abstract_state: Any) -> None: ...

        def save(self, *_: Any, **__: Any) -> float:
            return 0.0

    checkpoints = stack.enter_context(NoSaves(folder / "checkpoints"))

    def run(steps: int) -> float:
        nonlocal state, step
        assert stack is not None
        train = config.train.model_copy(update={"steps": step + steps})
        collector = Collector(sinks, tokens_per_step=job.tokens_per_step)
        loop = TrainingLoop(
            config=config.model_copy(update={"train": train}),
            job=job,
            update=update,
            checkpoints=checkpoints,
            collector=collector,
            window=ProfileWindow(start_step=None, directory=folder),
            stop=stop,
            watchdog=watchdog,
            say=print,
        )
        before = waits.seconds
        state, step = loop.run(state, step)
        collector.drain()
        return waits.seconds - before

    return run


class _Waits:
    """Adds up the time that steps waited for data."""

    seconds = 0.0

    def write(self, record: Any) -> None:
        self.seconds += record["data_wait_seconds"]

    def close(self) -> None: ...


CONFIG = {
    "topology": "cpu:8",
    "mesh": {"fsdp": 8},
    "rules": {"vocab": None},
    "remat": "full",
    "model": {
        "preset": "tiny",
        "overrides": {
            "layers": 4,
            "embed": 256,
            "heads": 8,
            "kv_heads": 8,
            "head_dim": 32,
            "mlp": 1024,
            "vocab": 1024,
            "tied_embeddings": False,
        },
    },
    "data": {"sequence": 256},
    "train": {"global_batch": 16, "steps": 10**6, "evaluate_every": 0},
    "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
    "checkpoint": {"every": 0},
}

if __name__ == "__main__":
    main()
