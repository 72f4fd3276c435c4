"""What is said where the installed Flax does not load with the installed JAX."""

from __future__ import annotations

import pathlib
import sys

import jax
from meshwright.sharding.processes import run

# A Flax that fails as 0.12.8 does beside JAX 0.11.
UNFIT = "raise AttributeError(\"module 'jax.experimental.hijax' has no attribute 'HiPrimitive'\")\n"


def test_a_model_names_both_versions_and_what_to_install(tmp_path: pathlib.Path) -> None:
    (tmp_path / "flax").mkdir()
    (tmp_path / "flax" / "__init__.py").write_text("")
    (tmp_path / "flax" / "nnx.py").write_text(UNFIT)
    metadata = tmp_path / "flax-0.12.7.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flax\nVersion: 0.12.7\n")
    source = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom meshwright.models import decoder\n"
    done = run([sys.executable, "-c", source], timeout_seconds=60)
    (*_, last) = done.stderr.strip().splitlines()
    assert f"flax 0.12.7 does not load with jax {jax.__version__} (module 'jax.experimental" in last
    assert "HiPrimitive'): pip install \"flax>=0.12." in last
    assert "cannot import name" not in done.stderr
