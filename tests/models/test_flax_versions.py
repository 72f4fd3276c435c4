"""What is said where the installed Flax does not load with the installed JAX."""

from __future__ import annotations

import pathlib
import re
import sys

import jax
import optax
from meshwright.models.flax_versions import why_not
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


def failing(package: str) -> Exception:
    """Return the error of a module of `package` that fails."""
    try:
        exec(
            "raise AttributeError(\"module 'jax' has no attribute 'tree_map'\")", {"__name__": f"{package}.x"}
        )
    except AttributeError as error:
        return error
    raise AssertionError


def test_a_package_that_flax_imports_and_that_does_not_load_is_named_itself() -> None:
    said = why_not(failing("optax"))
    assert f"since optax {optax.__version__} does not with jax {jax.__version__}" in said
    assert said.endswith("pip install --upgrade optax")


def test_a_flax_that_is_new_enough_is_to_be_replaced_by_the_version_that_is_known() -> None:
    assert re.search(r"pip install --force-reinstall \"flax==0\.12\.(8|10)\"$", why_not(failing("flax")))
