"""Scores of measured rows: what nothing was fitted to, and what no model could order."""

import csv
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent / "measured"))

import pytest
from accuracy import estimate
from measured.rows import parse
from test_measured_rows import COLUMNS

ROOT = Path(__file__).parents[2]

GPT = {
    "source": "made up",
    "n_layers": "12",
    "d_model": "1024",
    "n_heads": "16",
    "n_kv_heads": "16",
    "d_ff": "4096",
    "vocab": "50257",
    "seq_len": "1024",
    "hardware": "A100",
    "n_devices": "8",
    "recompute": "full",
    "schedule_interleave": "1f1b",
    "framework": "Megatron-DeepSpeed",
    "kind": "measured",
}
LAYOUTS = [(8, 1, 1), (4, 2, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2)]


def rows(batches: tuple[int, ...] = (16, 32, 64, 128)) -> list[dict[str, str]]:
    """Rows of some layouts whose times are what the shipped calibration says."""
    found = []
    for batch in batches:
        for data, tensor, stages in LAYOUTS:
            row = dict.fromkeys(COLUMNS, "") | GPT
            row |= {"model": "GPT", "global_batch_seqs": str(batch), "measured_step_time_s": "1"}
            row |= {
                "dp": str(data),
                "tp": str(tensor),
                "pp": str(stages),
                "microbatch": str(batch // data // 2),
            }
            row["measured_step_time_s"] = f"{estimate(parse(row)).step_seconds:.5f}"
            found.append(row)
    return found


def run(script: str, folder: Path, given: list[dict[str, str]], *arguments: str) -> str:
    path = folder / "sweeps.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(given)
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--sweeps", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_cells_left_out_of_a_fit_are_predicted_by_the_others(tmp_path):
    empty = tmp_path / "runs.csv"
    empty.write_text(",".join(COLUMNS) + "\n")
    told = run("held_out.py", tmp_path, rows(), "--runs", str(empty), "--folds", "4")
    assert told.startswith("a100.deepspeed-replicated: 4 cells held out")
    assert float(told.split("step time ")[1].split(" %")[0]) < 15.0


def test_a_larger_batch_that_took_less_time_is_counted(tmp_path):
    summary = json.loads(run("accuracy.py", tmp_path, rows(), "--json"))["sweeps"]["summary"]
    assert summary["larger_batches_faster"] == 0

    given = rows()
    given[-1]["measured_step_time_s"] = str(float(given[-1]["measured_step_time_s"]) / 100.0)
    summary = json.loads(run("accuracy.py", tmp_path, given, "--json"))["sweeps"]["summary"]
    assert (summary["larger_batches"], summary["larger_batches_faster"]) == (6 * len(LAYOUTS), 3)
