"""The markers, seen through pytest runs of their own."""

from __future__ import annotations

import subprocess

import pytest

pytest_plugins = ["pytester"]


@pytest.mark.devices(3)
def test_marker_gives_that_many_devices() -> None:
    import jax
    import jax.numpy as jnp

    mesh = jax.make_mesh((3,), ("data",))
    array = jax.device_put(jnp.arange(6), jax.NamedSharding(mesh, jax.P("data")))
    assert jax.device_count() == 3
    assert int(jax.jit(jnp.sum)(array)) == 15


@pytest.mark.parametrize("half", [1, 2])
@pytest.mark.devices(8)
def test_count_may_change_between_tests(half: int) -> None:
    import jax
    import jax.numpy as jnp

    assert [d.platform for d in jax.devices()] == ["cpu"] * 8
    assert jnp.arange(8)[:: 2 * half].devices() <= set(jax.devices())


@pytest.mark.processes(2, devices=2)
@pytest.mark.parametrize("value", [3])
def test_processes_reduce_over_all_devices(value: int, shared_path, tmp_path) -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental import multihost_utils

    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 2, 4)
    mesh = jax.make_mesh((4,), ("data",))
    ones = jax.jit(lambda: jnp.full((4,), value), out_shardings=jax.NamedSharding(mesh, jax.P("data")))()
    assert int(jax.jit(jnp.sum)(ones)) == 4 * value

    (shared_path / f"{jax.process_index()}").write_text("here")
    multihost_utils.sync_global_devices("written")
    assert sorted(file.name for file in shared_path.iterdir()) == ["0", "1"]
    assert tmp_path != shared_path


def test_an_unmarked_test_sees_jax_as_it_was(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(
        """
        import jax, pytest
        def test_before(): assert jax.device_count() == 2
        @pytest.mark.devices(5)
        def test_marked(): assert jax.device_count() == 5
        def test_after(): assert jax.device_count() == 2
        """
    )
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    pytester.runpytest_subprocess().assert_outcomes(passed=3)


WRONG_USES = {
    "devices(0)": "*test_it has marker devices with count=0, not a whole number from 1 up; use devices(2)",
    "devices()": "*devices with no number*",
    "devices('8')": "*devices with count='8'*",
    "devices(count=8, ranks=2)": "*devices with unknown ranks=*",
    "processes(0)": "*processes with count=0*",
    "processes(True)": "*processes with count=True*",
    "processes(2, device=4)": "*processes with unknown device=; did you mean 'devices'?",
    "processes(2, 4)": "*processes with 2 unnamed arguments; it takes one, the count",
    "processes(2, timeout_seconds=0)": "*timeout_seconds=0, not a number above 0",
    "devices(8), pytest.mark.processes(2)": "*both markers devices and processes; write*",
}


def test_wrong_use_is_one_sentence(pytester: pytest.Pytester) -> None:
    for number, marks in enumerate(WRONG_USES):
        source = f"import pytest\npytestmark = [pytest.mark.{marks}]\ndef test_it(): pass\n"
        pytester.makepyfile(**{f"test_{number}": source})
    result = pytester.runpytest_subprocess("--strict-markers")
    outcomes = result.parseoutcomes()
    assert outcomes.get("passed", 0) == 0
    assert outcomes.get("failed", 0) + outcomes.get("errors", 0) == len(WRONG_USES)
    for sentence in WRONG_USES.values():
        result.stdout.fnmatch_lines_random([sentence])
    result.stdout.no_fnmatch_line("*Traceback*")


PROCESS_CASES = """
import os, pytest, signal, time

@pytest.fixture
def ready():
    assert "MESHWRIGHT_TEST_RANK" in os.environ, "fixtures belong to the processes"
    return True

@pytest.mark.processes(2)
def test_one_rank_fails(ready):
    import jax
    assert jax.process_index() != 1, "the second is unhappy"
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices("never")

@pytest.mark.processes(1, timeout_seconds=4)
def test_hangs():
    time.sleep(600)

@pytest.mark.processes(1)
@pytest.mark.xfail(strict=True)
def test_expected_to_fail():
    assert False

@pytest.mark.processes(1)
def test_skips_itself():
    pytest.skip("not today")

@pytest.mark.processes(1)
def test_is_killed():
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_failures_are_told_by_rank_and_nothing_is_left(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(PROCESS_CASES)
    result = pytester.runpytest_subprocess("-rs")
    result.assert_outcomes(failed=3, xfailed=1, skipped=1)
    result.stdout.fnmatch_lines_random(
        [
            "test_one_rank_fails: rank 1 failed, rank 0 was ended",
            "[[]1[]] *AssertionError: the second is unhappy",
            "test_hangs: rank 0 still ran after 4 s; it was killed",
            "[[]0[]]*in test_hangs",
            "test_is_killed: rank 0 was ended by SIGKILL",
            "SKIPPED*not today",
        ]
    )
    assert not _running(str(pytester.path))


def _running(words: str) -> list[str]:
    """Command lines of processes that mention `words`."""
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if words in line]
