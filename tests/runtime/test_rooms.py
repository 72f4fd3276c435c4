"""Which rooms of `runtime` know the whole config of a run, and what its command line imports."""

from __future__ import annotations

import ast
import pathlib
import re
import sys

import meshwright.runtime
import pytest
from meshwright.sharding.processes import run

ROOT = pathlib.Path(meshwright.runtime.__file__).parent
ROOMS = sorted(path.name for path in ROOT.iterdir() if (path / "__init__.py").exists())


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in ("config", "train")])
def test_a_room_takes_settings_of_its_own_only(room: str) -> None:
    """A function that takes the whole `Config` can be called, and tested, only with a whole run."""
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.arg) and node.annotation is not None:
                whole = re.search(r"(?<![\w.])Config\b", ast.unparse(node.annotation))
                assert whole is None, f"{path.relative_to(ROOT)}:{node.lineno}: {node.arg}"


WITHOUT_JAX = ("jax", "flax", "optax", "orbax", "grain")
COMMAND = """
import sys
absent = sys.argv.pop().split(",")
from meshwright.runtime.cli.main import main
try:
    main()
finally:
    print([name for name in absent if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], (*WITHOUT_JAX, "pydantic", "rich")),
        (["config"], WITHOUT_JAX),
        (["train", "no-such.yaml"], WITHOUT_JAX),
        (["plan", "no-such.yaml"], WITHOUT_JAX),
        (["launch", "no-such.yaml"], WITHOUT_JAX),
        (["checkpoint", "."], WITHOUT_JAX),
    ],
)
def test_what_a_command_does_not_need_is_not_imported(words: list[str], absent: tuple[str, ...]) -> None:
    done = run([sys.executable, "-c", COMMAND, *words, ",".join(absent)], timeout_seconds=60)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr
