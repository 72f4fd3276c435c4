"""README is short, and its program runs as it stands in a process of its own."""

import pathlib
import re
import subprocess
import sys

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_python_example_runs(tmp_path):
    example = re.search(r"```python\n(import jax.*?)```", README.read_text(), re.DOTALL)
    assert example is not None
    run = subprocess.run(
        [sys.executable, "-c", example[1]], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "a step takes" in run.stdout


def test_it_is_read_in_two_minutes():
    assert len(README.read_text().split()) <= 500
