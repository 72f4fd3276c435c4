"""Compiled steps against measured ones: `python benchmarks/compiled_runs.py --runs CSV [--only WORD]`.

The rows are other people's and not in this repository: the path says where they are (measured_runs.csv).
Each run of MaxText on one TPU slice that they have a rate for is planned with its model, mesh,
batch and nearest rematerialisation, compiled for its slice, which is not here, with its recipe's options
(compiled_runs.toml; `--plain`: with the compiler's own), and read as `meshwright plan --verify` reads it.
Printed are the seconds of a step as measured, as the Estimate has them, and as the compiler has them; at the
end the median absolute errors. The Estimate comes three times: by the chip's default calibration and by
MaxText's, which were fitted to such rows, and by one that was fitted to no run. The compiler's reading takes
its cycles, and from the chip's default calibration the rates of links and of kernels without cycles.
What was compiled before comes from the cache of proofs. Rows of several slices repeat the program of one
with a reduction over the network after it, and are left out.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import statistics
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import accuracy
import jax
import optax
from frameworks.record import plain as plain_record
from held_out import neutral
from measured.programs import decoder_config
from measured.rows import csv_file, parse
from measured.run import Run
from measured.shapes import NotExpressible
from meshwright.models import decoder
from meshwright.sharding import UserError, plan
from meshwright.sharding.verify.process import Limits
from meshwright.sharding.verify.verify import verify

_RECIPES = Path(__file__).with_suffix(".toml")
_BATCH = ("tokens", "targets", "segment_ids", "positions")
_OFFLOADED = ("attention/query", "attention/key", "attention/value")
# MaxText's policies as we say them; `minimal` keeps the results of products without a batch dimension.
_POLICIES: Mapping[str, str | dict[str, str]] = {
    "full": "full",
    "minimal": "dots",
    "qkv_proj_offloaded": dict.fromkeys(_OFFLOADED, "host"),
}
_COLUMNS = (
    "estimated_seconds",
    "maxtext_estimated_seconds",
    "unfitted_estimated_seconds",
    "compiled_seconds",
)
# On a machine that is busy with other compilers too.
_LIMITS = Limits(seconds=1800.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One run; seconds are of a step, 0 where nothing compiled; `time` is the compiled step's, by item."""

    name: str
    outcome: str
    measured_seconds: float
    estimated_seconds: float
    maxtext_estimated_seconds: float
    unfitted_estimated_seconds: float
    compiled_seconds: float
    compile_seconds: float
    peak_bytes: float
    usable_bytes: float
    time: Mapping[str, float]
    flops: float
    peak_flops: float
    message: str = ""

    def error(self, seconds: float) -> float:
        """Return the relative error of `seconds`."""
        return seconds / self.measured_seconds - 1.0


def runs(path: Path, only: str) -> Iterator[tuple[str, Run, str]]:
    """Yield name, run and rematerialisation policy of each row on one TPU slice, the smallest work first."""
    found = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            name = f"{row['model']} {row['hardware'].removeprefix('TPU ').removesuffix(' x1 slices')}"
            if row["framework"] != "MaxText" or row["recompute"] not in _POLICIES or only not in name:
                continue
            try:
                run = parse(row)
            except NotExpressible:
                continue
            if run.topology.is_torus and run.topology.num_slices == 1 and run.seconds is not None:
                found.append((name, run, row["recompute"]))
    return iter(sorted(found, key=lambda one: one[1].architecture.weights))


def measure(name: str, run: Run, policy: str, plain: bool, schedules: bool) -> Row:
    """Plan and compile one run, `plain` without options. Raises UserError where it cannot be planned."""
    arch = run.architecture
    recipe = tomllib.loads(_RECIPES.read_text(encoding="utf-8"))[run.topology.chip.name]
    config = dataclasses.replace(
        decoder_config(arch),
        # MaxText's decoder, whatever its MLP: parameters in float32, computing in bfloat16.
        param_dtype="float32",
        compute_dtype="bfloat16",
        bias="none",
        norm="rms",
        position_embedding="rope",
        tied_embeddings=False,
        attention_chunk=None,
        loss_chunk=None,
    )
    model = decoder(config)
    loss = jax.jit(model.loss)
    params = jax.eval_shape(jax.jit(model.init), jax.random.key(0))
    batch = {key: jax.ShapeDtypeStruct((arch.batch, arch.sequence), "int32") for key in _BATCH}
    optimizer = optax.adamw(3e-4)
    made = plan(
        loss,
        params,
        batch,
        topology=str(run.topology),
        optimizer=optimizer,
        names=model.names,
        mesh={axis: size for axis, size in run.layout["mesh"].items() if size > 1},
        remat=_POLICIES[policy],
        microbatches=1,
        attention=recipe["attention"],
    )
    if not plain:
        made = dataclasses.replace(made, compiler_options=recipe["options"])
    verdict = verify(made, loss, params, batch, optimizer, limits=_LIMITS, schedules=schedules)
    proof = verdict.proof
    assert run.seconds is not None
    return Row(
        name=name,
        outcome=verdict.outcome,
        measured_seconds=run.seconds,
        # By the chip's own efficiencies, with gathers beside other work: the recipes' options put them there.
        estimated_seconds=accuracy.estimate(run, plain_record(run.topology.chip.name)).step_seconds,
        maxtext_estimated_seconds=accuracy.estimate(run).step_seconds,
        unfitted_estimated_seconds=_unfitted(run),
        compiled_seconds=0.0 if proof is None else proof.step_seconds,
        compile_seconds=0.0 if proof is None else proof.compile_seconds,
        peak_bytes=verdict.peak_bytes,
        usable_bytes=verdict.capacity_bytes,
        time={} if proof is None else dict(proof.time),
        flops=0.0 if proof is None else proof.flops,
        peak_flops=run.topology.chip.peak_flops("bfloat16") or 0.0,
        message=verdict.message,
    )


def _unfitted(run: Run) -> float:
    """Return the Estimate's seconds of a run by efficiencies that know of no measured one."""
    record = neutral(run.topology.chip.name, run.framework["calibration"])
    return accuracy.estimate(run, record).step_seconds


def show(row: Row) -> None:
    """Print a row, and what its compiled step's time consists of."""
    guesses = (getattr(row, column) for column in _COLUMNS)
    figures = "  ".join(f"{seconds:8.3f} {100 * row.error(seconds):+6.1f}%" for seconds in guesses)
    held = f"{row.peak_bytes / 1e9:.1f} of {row.usable_bytes / 1e9:.1f} GB"
    print(f"{row.name:30} {row.measured_seconds:8.3f}  {figures}  {row.outcome}, {held} {row.message}")
    items = sorted(row.time.items(), key=lambda item: -item[1])
    print(
        "    "
        + ", ".join(
            f"{name} {seconds:.3f}" for name, seconds in items if seconds > 0.002 * row.compiled_seconds
        )
        + f"; products at the peak {row.flops / row.peak_flops:.3f}",
        flush=True,
    )


def summary(rows: list[Row]) -> dict[str, float]:
    """Return the median absolute errors over the rows that compiled."""
    done = [row for row in rows if row.compiled_seconds]
    found: dict[str, Any] = {"rows": len(done)}
    for column in _COLUMNS if done else ():
        errors = [row.error(getattr(row, column)) for row in done]
        found[column] = statistics.median(abs(error) for error in errors)
        found[f"{column}_bias"] = statistics.median(errors)
    return found


def main() -> int:
    """Print every row and the medians, or all as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=csv_file, required=True, help="training runs, one a row")
    parser.add_argument("--only", default="", help="runs whose name contains this, such as 32B or v5p")
    parser.add_argument("--plain", action="store_true", help="compile without the recipe's options")
    parser.add_argument(
        "--schedules", action="store_true", help="time products by libtpu's schedules: twice the work"
    )
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    if not words.json:
        heads = ("Estimate", "MaxText-fitted", "fitted to none", "compiled")
        print(f"{'':30} measured" + "".join(f"  {head:>16}" for head in heads))
    rows = []
    for name, run, policy in runs(words.runs, words.only):
        try:
            rows.append(measure(name, run, policy, words.plain, words.schedules))
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        if not words.json:
            show(rows[-1])
    found = summary(rows)
    if words.json:
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows], "summary": found}, indent=2))
    else:
        print({key: round(value, 4) for key, value in found.items()})
    return 0 if rows else 2


if __name__ == "__main__":
    sys.exit(main())
