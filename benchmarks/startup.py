"""From the start of a process to its first finished step, against bare JAX; imports and `--help` besides.

`python benchmarks/startup.py [--rounds 3]` runs each command in turn, so that a change of the machine's speed
falls on all alike, and prints medians and ratios.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable

import yaml
from step_time import CONFIG

_IMPORTS_A_ROUND = 5
HERE = pathlib.Path(__file__).parent


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch:
        seconds = _measure(pathlib.Path(scratch), rounds)
    for name, found in seconds.items():
        print(f"{name:34} {statistics.median(found):7.2f} s   ({min(found):.2f} to {max(found):.2f})")

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))

    print(
        f"\ncold, against bare JAX cold         {ratio('train, cold', 'bare JAX, cold'):5.2f}   (target 1.3)"
    )
    print(f"warm, against cold                  {ratio('train, warm', 'train, cold'):5.2f}   (target 0.5)")
    added = statistics.median(
        a - b for a, b in zip(seconds["import meshwright.sharding"], seconds["import jax"], strict=True)
    )
    print(f"import meshwright.sharding - jax    {added:5.2f} s (target 0.1)")
    print(f"meshwright --help                   {statistics.median(seconds['--help']):5.2f} s (target 0.5)")


def _measure(scratch: pathlib.Path, rounds: int) -> dict[str, list[float]]:
    config = scratch / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    train = [sys.executable, "-m", "meshwright.runtime.cli", "train", str(config), "train.steps=1"]
    train += [f"run={scratch}/run", "metrics.console=lines", f"compilation_cache={scratch}/ours"]
    bare = [sys.executable, str(HERE / "bare.py"), "0", "--cache", str(scratch / "bare")]
    imports = {
        "import jax": [sys.executable, "-c", "import jax"],
        "import meshwright.sharding": [sys.executable, "-c", "import jax, meshwright.sharding"],
        "--help": [sys.executable, "-m", "meshwright.runtime.cli", "--help"],
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    _first_step(train)  # Tokenises the text once and brings every file into the page cache.
    for _ in range(rounds):
        for folder in ("ours", "bare"):
            shutil.rmtree(scratch / folder, ignore_errors=True)
        for temperature in ("cold", "warm"):
            seconds[f"bare JAX, {temperature}"].append(_whole(bare))
            shutil.rmtree(scratch / "run", ignore_errors=True)
            seconds[f"train, {temperature}"].append(_first_step(train))
        for _ in range(_IMPORTS_A_ROUND):
            for name, command in imports.items():
                seconds[name].append(_whole(command))
    return seconds


def _whole(command: list[str]) -> float:
    return _timed(command, lambda line: False)


def _first_step(command: list[str]) -> float:
    return _timed(command, lambda line: line.startswith("step 1/"))


def _timed(command: list[str], done: Callable[[str], bool]) -> float:
    """Seconds until a line on stderr says that it is done, or until the process ends."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert process.stderr is not None
    seconds = None
    for line in process.stderr:
        if seconds is None and done(line):
            seconds = time.perf_counter() - began
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - began if seconds is None else seconds


if __name__ == "__main__":
    main()
