"""What is private to JAX, or differs between its generations, stands in five named modules."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# The programs of the trace, modules that profiles hold, cuDNN's calls for GPUs that are not here, kernels'
# gradients of pieces, the detection of clusters.
HOMES = {
    "sharding/hlo/proto.py",
    "sharding/program/jaxpr.py",
    "sharding/ops/cudnn.py",
    "sharding/ops/context/pieces.py",
    "runtime/hosts/clusters.py",
}
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("sharding", "models", "runtime")
    for path in (ROOT / package).rglob("*.py")
)


def violations(text: str) -> list[str]:
    """Say where a module reaches into JAX, or asks which JAX it has."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", ast.unparse(node)):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr"):
            # What JAX has is asked only to do without it in another generation.
            names = [f"{ast.unparse(node.args[0])}._asked"]
        elif isinstance(node, ast.Compare):
            sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
            constant = any(isinstance(side, ast.Constant) for side in (node.left, *node.comparators))
            names = [f"{side}._compared" for side in sides if constant and side.startswith("jax.__version")]
        elif isinstance(node, ast.Try):
            # An import of JAX's that may fail is a question too.
            names = [
                f"{inner.module}._tried"
                for inner in node.body
                if isinstance(inner, ast.ImportFrom) and not inner.level
            ]
        for name in names:
            first, *others = name.split(".")
            if first in ("jax", "jaxlib") and any(
                part.startswith("_") and not part.startswith("__") for part in others
            ):
                found.append(f"line {node.lineno}: {name}")
            if name == "jax.__version_info__":
                found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize(
    "text",
    [
        "from jax._src import core",
        "import jax._src.lax",
        "x = jax._src.config",
        "from jaxlib import _jax",
        "if jax.__version_info__ >= (0, 11): pass",
        "if jax.__version__ >= '0.11': pass",
        "hasattr(jax.lax, 'tile')",
        "try:\n    from jax.lax import tile\nexcept ImportError: pass",
    ],
)
def test_a_reach_into_jax_is_found(text: str) -> None:
    assert violations(text)


@pytest.mark.parametrize(
    "text",
    [
        "import jax",
        "jax.lax.top_k",
        "from ._src import a",
        "x = self._jax",
        "jax.jit(self._run).lower",
        "same = jax.__version__ == a.jax",
    ],
)
def test_what_is_public_is_no_reach(text: str) -> None:
    assert not violations(text)


def test_private_names_stand_in_five_modules() -> None:
    found = {file: violations((ROOT / file).read_text("utf-8")) for file in FILES}
    assert {file for file, lines in found.items() if lines} == HOMES, found


@pytest.mark.parametrize("file", sorted(HOMES))
def test_a_private_name_says_for_which_versions(file: str) -> None:
    text = (ROOT / file).read_text("utf-8")
    assert "0.10" in text
    assert "0.12" in text
