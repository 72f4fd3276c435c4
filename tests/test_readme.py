import pathlib
import re
import subprocess
import sys

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_python_example_runs_and_prints_the_picture_that_is_shown(tmp_path):
    text = README.read_text()
    example = re.search(r"```python\n(import jax\n.*?)```", text, re.DOTALL)
    shown = re.search(r"```text\n(float32.*?)```", text, re.DOTALL)
    assert example is not None
    assert shown is not None
    run = subprocess.run(
        [sys.executable, "-c", example[1]], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr
    assert shown[1].strip() in run.stdout


def test_every_command_and_file_that_is_named_exists():
    text = README.read_text()
    from meshwright.runtime.cli.main import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"^\$ meshwright (\w+)", text, re.MULTILINE)) == known
    for path in re.findall(r"(?:configs|notebooks|benchmarks)/[\w./-]+\w", text):
        assert (README.parent / path).exists(), path
