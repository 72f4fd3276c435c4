"""What all tests share: caches that are not the user's, numerics compiled fast, files kept in one process.

``@pytest.mark.numerics``
    Only values are looked at. Programs have no lines of what they are made of, child processes too compile
    without most optimisations, and keep what they make for those of the rest of the run. Never where the
    text, the memory or the time of a compiled program is read: in a file of numerics such a test has
    ``numerics(False)``, and ``numerics(False, optimised=True)`` where values come nearer by optimised code.

``--first-cases``, as ``make test-next`` runs
    Of a test with several cases the first alone, since the others are other ways through this package's code.
    Not where each case is other primitives of JAX (``@pytest.mark.primitives``), or is named in the command.
    And none of a test that compiles what says nothing more of JAX: ``@pytest.mark.once(FILE)`` names the file
    of tests, of this run, that goes through the same primitives, transforms and compilers.
"""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import contexts
import hypothesis
import pytest
from forks import forked
from meshwright.runtime.testing import processes as ranks
from meshwright.sharding.hardware.attached import quiet_absent
from meshwright.sharding.processes import start
from meshwright.sharding.verify import process as compiling

# The folder of compiled programs: of one run with all its processes or, if it is set before, of several runs.
_PROGRAMS = "MESHWRIGHT_TEST_PROGRAMS"
# What starts processes that wait for each other or looks at the time: two of these never run at once.
_ALONE = tuple(
    f"tests/runtime/{name}"
    for name in ("checkpoint/test_processes", "faults/", "hosts/", "launch/", "testing/", "train/test_resume")
)
# How many other tests a slow one takes as long as.
_SLOW = 50
# How XLA is told to write fused loops for CPUs by its older emitters, by the generation of jaxlib.
_OLDER_EMITTERS = {
    "0.10": ("--xla_cpu_use_fusion_emitters=false",),
    "0.11": ("--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",),
}
_given: dict[str, tuple[object]] = {}
_numbers = itertools.count()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run on another JAX take the first case of each test."""
    parser.addoption(
        "--first-cases", action="store_true", help="what says something of JAX; see tests/conftest.py"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder of compiled programs, unless the process that started this one did."""
    # Tests run on simulated devices, those without the marker too.
    quiet_absent()
    _compile_fast()
    _fork(config)
    # Other processes share the cores: a test is not wrong because it took its time.
    slow = hypothesis.HealthCheck.too_slow
    hypothesis.settings.register_profile("shared", deadline=None, suppress_health_check=[slow])
    hypothesis.settings.load_profile("shared")
    config.addinivalue_line("markers", "numerics: only values are looked at; see tests/conftest.py")
    config.addinivalue_line(
        "markers", "once(file): another JAX is tested by those of `file`; see tests/conftest.py"
    )
    config.addinivalue_line(
        "markers", "primitives: each case is other primitives of JAX; see tests/conftest.py"
    )
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # By number of tests, which leaves few long ones to the end.
    if _PROGRAMS not in os.environ:
        os.environ[_PROGRAMS] = folder = tempfile.mkdtemp(prefix="meshwright-test-programs-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """Look for no garbage at the end: pytest would ten times, through all that lives, and Python again."""
    gc.freeze()


def _fork(config: pytest.Config) -> None:
    """Let ``@pytest.mark.processes``, and what compiles a plan, start processes as forks.

    Not where that marker itself or the limits of a process that compiles are tested.
    """
    patch = pytest.MonkeyPatch()
    for module in (ranks, compiling):
        patch.setattr(module, "start", lambda command, **options: start(forked(command), **options))
    config.add_cleanup(patch.undo)


def _compile_fast() -> None:
    """Compile for CPUs in less time, and look for cyclic garbage less often.

    The suite's processes keep all cores busy, so that LLVM need not divide a program among threads. XLA's
    older emitters, which JAX 0.12 has no more, write fused loops in a third of the time; fusions are chosen
    alike: temporaries of the tests' models differ by less than one part in a hundred.
    """
    gc.set_threshold(100_000, 20, 100)
    if "XLA_FLAGS" not in os.environ:
        generation = importlib.metadata.version("jaxlib").rpartition(".")[0]
        flags = ["--xla_cpu_parallel_codegen_split_count=1", *_OLDER_EMITTERS.get(generation, ())]
        os.environ["XLA_FLAGS"] = " ".join(flags)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the files that take longest first, so that no process waits for another's last file."""
    if config.option.first_cases:
        items[:], others = _first_cases(items, config.args)
        config.hook.pytest_deselected(items=others)
    weights: dict[str, int] = {}
    for item in items:
        file = _scope(item.nodeid)
        weights[file] = weights.get(file, 0) + (_SLOW if item.get_closest_marker("slow") else 1)
    items.sort(key=lambda item: -weights[_scope(item.nodeid)])


def _first_cases(items: list[pytest.Item], named: list[str]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Return the tests that `--first-cases` runs, and the others."""
    known: set[str] = set()
    kept, others = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        whole = item.nodeid in named or item.get_closest_marker("primitives")
        again = test in known or item.get_closest_marker("once")
        (kept if whole or not again else others).append(item)
        known.add(test)
    return kept, others


def _scope(nodeid: str) -> str:
    """Return what one process runs: a file, or all of `_ALONE`."""
    file = nodeid.partition("::")[0]
    return "alone" if file.startswith(_ALONE) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep each file in one worker: its tests share fixtures and compiled programs; so with `_ALONE`.

    By a scheduler, since under pytest 9.2 the groups of pytest-xdist 3.8 have no effect.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    return ByFile(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Set JAX up before any fixture, of whatever scope, that this test is the first to ask for."""
    mark = item.get_closest_marker("numerics")
    numerics = mark is not None and mark.args != (False,)
    # LLVM alone does less, which takes a fifth of the time: text and memory of a CPU's program are the same
    # (`test_conftest.py`). A child may compile for other chips, whose programs are others then.
    _set("jax_disable_most_optimizations", numerics, here=False)
    optimised = mark is not None and mark.kwargs.get("optimised", False)
    _set("jax_disable_most_optimizations", not optimised, children=False)
    _set("jax_persistent_cache_min_compile_time_secs", 0.0 if numerics else 1.0)
    _set("jax_traceback_in_locations_limit", 0 if numerics else 10)  # Lines of operations in compiled text.
    # For child processes, whose runs are much alike. Tests in this one compile little twice, and to look a
    # program up and to write it takes several times what is spared.
    _set("jax_compilation_cache_dir", os.environ[_PROGRAMS] if numerics else None, here=False)
    if "jax" in sys.modules:
        contexts.share()
    return (yield)


def _set(name: str, value: bool | float | str | None, *, here: bool = True, children: bool = True) -> None:
    """Give a setting of JAX to child processes and, unless it is what it was, to this one."""
    if children and value is None:
        os.environ.pop(name.upper(), None)
    elif children:
        os.environ[name.upper()] = str(value)
    if here and "jax" in sys.modules and _given.get(name) != (value,):
        import jax

        jax.config.update(name, value)
        _given[name] = (value,)


@pytest.fixture(scope="session", autouse=True)
def cache_of_wider_fixtures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """Keep from the user's cache what is set up for several tests; return the folder of all caches."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "wider"))
        yield folder


@pytest.fixture(autouse=True)
def own_cache(cache_of_wider_fixtures: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a cache that is neither the user's nor another test's (`sharding/files.py`)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_of_wider_fixtures / str(next(_numbers))))
