"""Pytest markers for code that runs on many devices or in many processes.

``@pytest.mark.devices(8)``
    Inside the test `jax.devices()` is 8 simulated CPU devices, whatever the machine has. Arrays made at
    import or in a fixture of wider scope may belong to devices that are gone: make them in the test.

``@pytest.mark.processes(2, devices=4, timeout_seconds=60)``
    The body runs in 2 real processes joined by `jax.distributed` over loopback, 4 simulated devices each.
    Fixtures and parameters are set up in each process; `shared_path` is a folder common to all of them.

Nothing here imports JAX until a marked test runs.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

from ...sharding.errors import nearest
from ...sharding.hardware.attached import quiet_absent
from ..hosts.simulated import enough_threads
from .processes import FOLDER, RANK, Rank, run_in_processes

_DEVICES_USE = "devices(count): run with exactly `count` simulated CPU devices"
_PROCESSES_USE = (
    "processes(count, devices=1, timeout_seconds=60): run the body in `count` real processes joined by "
    "jax.distributed, with `devices` simulated CPU devices each; one that outlives the time limit fails"
)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers; in a process that a `processes` test started, join the others."""
    config.addinivalue_line("markers", _DEVICES_USE)
    config.addinivalue_line("markers", _PROCESSES_USE)
    if RANK in os.environ:
        config.pluginmanager.register(Rank(), "meshwright-rank")
    else:
        config.pluginmanager.register(_Devices(), "meshwright-devices")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the launch of real processes in the place of the body of every `processes` test."""
    if RANK in os.environ:
        return
    for item in items:
        if item.get_closest_marker("processes") is not None:
            _run_elsewhere(item)


@pytest.fixture
def shared_path(request: pytest.FixtureRequest) -> pathlib.Path:
    """Folder that all processes of a `processes` test share; `tmp_path` in any other test."""
    if FOLDER in os.environ:
        folder = pathlib.Path(os.environ[FOLDER]) / "shared"
        folder.mkdir(exist_ok=True)
        return folder
    return request.getfixturevalue("tmp_path")


class _Devices:
    """Gives each test its number of simulated devices, and JAX as it was to the tests without a marker."""

    def __init__(self) -> None:
        self._before: tuple[int, str | None] | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        mark = item.get_closest_marker("devices")
        if item.get_closest_marker("processes") is not None:
            if mark is not None:
                _refuse(item, "has both markers devices and processes; write processes(count, devices=…)")
        elif mark is not None:
            _no_other_keywords(item, mark, ("count",))
            self._simulate(item, _whole(item, mark, "count"))
        elif self._before is not None:
            _configure_devices(*self._before)
            self._before = None
        return (yield)

    def _simulate(self, item: pytest.Item, count: int) -> None:
        import jax

        settings: Any = jax.config  # Its attributes are made at run time.
        before = settings.jax_num_cpu_devices, settings.jax_platforms
        _configure_devices(count, "cpu")
        self._before = self._before or before
        if jax.device_count() != count:
            _refuse(item, f"asked for {count} devices but JAX gives {jax.device_count()}")


def _configure_devices(count: int, platforms: str | None) -> None:
    """Make JAX see `count` CPU devices (-1: its default), dropping backends that exist and differ."""
    import jax
    import jax.extend.backend

    if count > 0:
        quiet_absent()
        enough_threads(count)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # The backends exist already.
        if count == jax.device_count() and jax.default_backend() == platforms == "cpu":
            return
        jax.extend.backend.clear_backends()
        jax.clear_caches()
        jax.config.update("jax_num_cpu_devices", count)
    jax.config.update("jax_platforms", platforms)


def _run_elsewhere(item: pytest.Item) -> None:
    """Replace setup and body of `item`: its fixtures belong to the processes that it starts."""
    item.setup = lambda: None
    item.runtest = lambda: _launch(item)


def _launch(item: pytest.Item) -> None:
    mark = item.get_closest_marker("processes")
    assert mark is not None
    _no_other_keywords(item, mark, ("count", "devices", "timeout_seconds"))
    count = _whole(item, mark, "count")
    devices = _whole(item, mark, "devices", default=1)
    timeout = mark.kwargs.get("timeout_seconds", 60)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
        _refuse(item, f"has timeout_seconds={timeout!r}, not a number above 0")
    run_in_processes(item, count, devices, timeout)


def _whole(item: pytest.Item, mark: pytest.Mark, name: str, default: int | None = None) -> int:
    value = mark.args[0] if name == "count" and mark.args else mark.kwargs.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        written = "no number" if value is None else f"{name}={value!r}"
        _refuse(
            item, f"has marker {mark.name} with {written}, not a whole number from 1 up; use {mark.name}(2)"
        )
    return value


def _no_other_keywords(item: pytest.Item, mark: pytest.Mark, known: tuple[str, ...]) -> None:
    for keyword in mark.kwargs:
        if keyword not in known:
            _refuse(item, f"has marker {mark.name} with unknown {keyword}=; {nearest(keyword, known)}")
    if len(mark.args) > 1 or (mark.args and "count" in mark.kwargs):
        count = len(mark.args)
        _refuse(item, f"has marker {mark.name} with {count} unnamed arguments; it takes one, the count")


def _refuse(item: pytest.Item, reason: str) -> NoReturn:
    pytest.fail(f"{item.name} {reason}", pytrace=False)
