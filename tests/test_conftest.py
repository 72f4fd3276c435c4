"""What `conftest.py` says of all tests' programs."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forks import forked
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

_AS_USERS_DO = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@pytest.mark.devices(8)
def test_programs_have_the_text_and_memory_that_they_have_with_all_optimisations() -> None:
    def loss(params: list[jax.Array], x: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.logsumexp(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params[0])[0]))

    mesh = jax.sharding.Mesh(np.reshape(jax.devices(), (4, 2)), ("fsdp", "tensor"))
    shapes = [((3, 16, 16), P(None, "fsdp", "tensor")), ((8, 16), P("fsdp"))]
    weights, x = (
        jax.ShapeDtypeStruct(size, "float32", sharding=NamedSharding(mesh, spec)) for size, spec in shapes
    )
    lowered = jax.jit(jax.grad(loss)).lower([weights], x)
    plain, here = lowered.compile(compiler_options=_AS_USERS_DO), lowered.compile()
    assert here.as_text() == plain.as_text()
    held = [one.memory_analysis().temp_size_in_bytes for one in (here, plain)]
    assert held[0] == held[1] > 0
    # The machine's code is another, which says that the one before was optimised.
    code = [len(one.runtime_executable().serialize()) for one in (here, plain)]
    assert code[0] != code[1]


def test_a_threads_programs_share_contexts_and_have_the_text_of_one_in_its_own() -> None:
    def lowered(times: int) -> jax.stages.Lowered:
        return jax.jit(lambda x: jnp.tanh(x) * times).lower(1.0)

    here = [lowered(times) for times in (2, 3, 2)]
    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(lowered, 2).result()
    assert len({id(one.compiler_ir().context) for one in here}) <= 2
    assert here[0].compiler_ir().context is not other.compiler_ir().context
    assert here[0].as_text() == here[2].as_text() == other.as_text()


@pytest.mark.numerics
def test_a_fork_has_the_settings_that_a_child_takes_from_its_environment() -> None:
    source = (
        "import jax; held = jax.config.values; print(held['jax_disable_most_optimizations'], "
        "held['jax_traceback_in_locations_limit'], held['jax_compilation_cache_dir'])"
    )
    done = subprocess.run(forked([sys.executable, "-c", source]), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0", os.environ["JAX_COMPILATION_CACHE_DIR"]]


def test_of_each_test_the_first_case_runs_on_the_newest_jax_or_all_of_primitives() -> None:
    here = "tests/test_generations.py"
    named = f"{here}::test_a_private_name_says_for_which_versions[sharding/program/jaxpr.py]"
    paths = [here, named, "tests/sharding/program/test_primitives.py"]
    asked = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    whole, first = (
        subprocess.run(forked([*asked, *option, *paths]), capture_output=True, text=True, check=True).stdout
        for option in ([], ["--first-cases"])
    )
    cases = [line for line in whole.splitlines() if "::" in line]
    ways = [line for line in cases if line.startswith(here)]
    firsts = {line.partition("[")[0]: line for line in reversed(ways)}
    assert len(firsts) < len(ways)
    kept = {*firsts.values(), named, *(line for line in cases if line not in ways)}
    assert [line for line in first.splitlines() if "::" in line] == [line for line in cases if line in kept]


def test_what_runs_on_one_jax_names_a_file_whose_tests_run_on_the_newest_too() -> None:
    tests = pathlib.Path(__file__).parent
    marked = re.compile(r'^@pytest\.mark\.once\("([^"]+)"\)$', flags=re.M)
    files = [path for path in tests.rglob("test_*.py") if marked.search(path.read_text("utf-8"))]
    named = {f"tests/{file}" for path in files for file in marked.findall(path.read_text("utf-8"))}
    asked = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    asked += ["--first-cases", *sorted(named)]
    done = subprocess.run(forked(asked), capture_output=True, text=True, check=True)
    kept = {line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line}
    assert named == {test.partition("::")[0] for test in kept}
    tested = re.compile(r"^@pytest\.mark\.once\(.*?^def (test_\w+)", flags=re.M | re.S)
    left = {
        f"{file}::{name}"
        for file in named
        for name in tested.findall((tests.parent / file).read_text("utf-8"))
    }
    assert left
    assert not left & kept
