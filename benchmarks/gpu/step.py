"""Configurations' steps on the devices that are here: estimate, compiled memory, seconds and bytes.

`python benchmarks/gpu/step.py CONFIG.yaml --rows CSV --way NAME [section.key=value]... [@option=value]...`
times the compiled step of each way (there may be several) alone, on the config's own packed batches, prints
one JSON line a way and appends it to the CSV, whose columns are those of
`benchmarks/measured/own_gpu_runs.csv`. Words with `@` are options of the compiler. `--trace DIR` keeps a
profile of two more steps and the compiled program's text of each way in DIR/NAME.
"""

from __future__ import annotations

import argparse
import csv
import json
import pathlib
import statistics
import time
from typing import Any

from traced import traced

_COLUMNS = pathlib.Path(__file__).parents[1] / "measured" / "own_gpu_runs.csv"
_WARM, _ROUNDS = 3, 3


def main() -> None:
    """Print and append the rows; a way that fails says so, and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=pathlib.Path)
    parser.add_argument("--way", action="append", nargs="+", required=True)
    parser.add_argument("--rows", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--trace", type=pathlib.Path)
    given = parser.parse_args()
    failed = False
    for name, *words in given.way:
        overrides = [word for word in words if word[0] != "@"]
        options = dict(_option(word[1:]) for word in words if word[0] == "@")
        folder = None if given.trace is None else given.trace / name
        try:
            row = {"name": name, **measured(given.config, overrides, options, given.steps, folder)}
        except Exception as error:  # one way's fault is an answer about it alone
            print(f"{name}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
            failed = True
            continue
        print(json.dumps(row), flush=True)
        new = not given.rows.exists()
        with given.rows.open("a", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS.read_text().splitlines()[0].split(","))
            if new:
                writer.writeheader()
            writer.writerow(row)
    raise SystemExit(failed)


def _option(word: str) -> tuple[str, Any]:
    import yaml

    key, _, value = word.partition("=")
    return key, yaml.safe_load(value) if value else ""


def measured(
    path: pathlib.Path, overrides: list[str], options: dict[str, Any], steps: int, folder: pathlib.Path | None
) -> dict[str, Any]:
    """Return the row of a config, without its name."""
    import jax
    from meshwright.runtime.config import load
    from meshwright.runtime.hosts import initialize
    from meshwright.runtime.train.job import build_job
    from meshwright.runtime.train.run import simulated_devices
    from meshwright.sharding.verify.worker import peak_of

    config = load(path, overrides)
    initialize(config.hosts, simulated_devices=simulated_devices(config))
    jax.config.update("jax_enable_compilation_cache", False)
    job = build_job(config)
    lowered = job.step.update.lower(job.step.abstract_state, job.abstract_batch)
    begun = time.perf_counter()
    compiled = lowered.compile(compiler_options=options or None)
    compile_seconds = time.perf_counter() - begun
    state = job.step.init(jax.random.key(config.seed))
    with job.data.iterate(0, job.step.batch["tokens"], stop_step=1) as batches:
        batch = next(batches)
    for _ in range(_WARM):
        state, metrics = compiled(state, batch)
    jax.block_until_ready(metrics)
    rounds = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        for _ in range(steps):
            state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        rounds.append((time.perf_counter() - begun) / steps)
    plan, device = job.plan, jax.local_devices()[0]
    estimate = plan.estimate
    kernel = plan.kernels.get("attention", {"implementation": "xla"})
    attention = ", ".join(
        [kernel["implementation"], *(f"{n} segments" for n in [kernel.get("segments")] if n)]
    )
    said = [f"loss {float(metrics['loss']):.4f}", *(f"{key}={value}" for key, value in options.items())]
    said += ["arithmetic: auto"] if "arithmetic" in plan.kernels else []
    row = {
        "preset": config.model.preset,
        "overrides": ";".join(f"{key}={value}" for key, value in config.model.overrides.items()),
        "batch": config.train.global_batch,
        "sequence": config.data.sequence,
        "device": device.device_kind,
        "jax": jax.__version__,
        "remat": " ".join(["keep", *plan.saved]) if plan.saved else plan.remat,
        "attention": attention,
        "microbatches": plan.microbatches,
        "parameters": job.model.num_parameters,
        "flops_per_step": job.flops_per_step,
        "measured_step_seconds": round(statistics.median(rounds), 6),
        "measured_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "compiled_peak_bytes": peak_of(compiled.memory_analysis(), job.topology),
        "compile_seconds": round(compile_seconds, 1),
        "estimated_step_seconds": None if estimate is None else round(estimate.step_seconds, 6),
        "estimated_peak_bytes": None if estimate is None else int(estimate.peak_bytes),
        "notes": "; ".join(said),
    }
    if folder is not None:
        traced(lowered, (state,), (batch,), folder, options)
    return row


if __name__ == "__main__":
    main()
