"""Small runs of the command line, on real text and simulated devices, for the tests of the whole."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import yaml
from forks import forked
from meshwright.sharding import processes

CONFIG: dict[str, Any] = {
    "name": "small",
    "topology": "cpu:4",
    "mesh": {"data": 2, "fsdp": 2},
    "model": {
        "preset": "tiny",
        "overrides": {"layers": 2, "embed": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "mlp": 64},
    },
    "data": {"sequence": 32},
    "train": {"steps": 12, "global_batch": 8, "evaluate_every": 0},
    "optimizer": {"schedule": "constant"},
    "checkpoint": {"every": 2, "keep_last": None},
    "metrics": {"console": "lines", "console_every": 1},
}


def write_text(folder: pathlib.Path) -> None:
    """Write two dozen short documents, all different."""
    folder.mkdir(parents=True)
    for number in range(24):
        lines = [f"line {line} of file {number} says {line * number % 97}" for line in range(40)]
        (folder / f"{number}.txt").write_text("\n".join(lines))


def write_config(home: pathlib.Path) -> pathlib.Path:
    """Write text and a config that trains on it under `home`; return the config's path.

    Tokens stay in `home` too, for all runs of the config; compiled programs where the suite keeps them.
    """
    write_text(home / "text")
    data = {**CONFIG["data"], "source": str(home / "text"), "cache": str(home / "tokens")}
    config = {**CONFIG, "data": data, "compilation_cache": os.environ.get("MESHWRIGHT_TEST_PROGRAMS")}
    path = home / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(*words: object) -> list[str]:
    """The command line that runs `meshwright` with `words`; a launcher has little to import."""
    plain = [sys.executable, "-m", "meshwright.runtime.cli", *map(str, words)]
    return plain if words[0] == "launch" else forked(plain)


def meshwright(*words: object) -> subprocess.CompletedProcess[str]:
    """Run `meshwright` to its end."""
    return processes.run(command(*words), timeout_seconds=240)


def start(*words: object) -> subprocess.Popen[str]:
    """Start `meshwright` with stdout and stderr in one pipe, in a session of its own."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return processes.start(command(*words), stdout=subprocess.PIPE, text=True, env=environment)


def metrics(run: pathlib.Path) -> list[dict[str, Any]]:
    """Records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def saved_steps(run: pathlib.Path) -> list[int]:
    """Steps of the checkpoints that a run holds, in order."""
    folder = run / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
