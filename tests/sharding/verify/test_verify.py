"""Plans through real compilers, in processes of their own: each way that it can end is a clear outcome."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.sharding import Plan, Topology, UserError, plan, processes
from meshwright.sharding.cost.calibration import calibration_for
from meshwright.sharding.verify import cache
from meshwright.sharding.verify import process as child
from meshwright.sharding.verify.process import Limits
from meshwright.sharding.verify.verify import verify
from meshwright.sharding.xla.options import options_to_trace

WIDTH, ROWS = 512, 256


def loss(params: Any, batch: Any) -> Any:
    hidden = jax.nn.relu(batch["x"] @ params["up"])
    return jnp.mean((hidden @ params["down"] - batch["y"]) ** 2)


def program(width: int = WIDTH, rows: int = ROWS) -> tuple[Any, Any, Any, Any]:
    shape = jax.ShapeDtypeStruct
    params = {"up": shape((width, 4 * width), "float32"), "down": shape((4 * width, width), "float32")}
    batch = {name: shape((rows, width), "float32") for name in ("x", "y")}
    return loss, params, batch, optax.adamw(1e-3)


def planned(topology: str = "cpu:8", width: int = WIDTH, rows: int = ROWS, **declared: Any) -> Plan:
    loss, params, batch, optimizer = program(width, rows)
    return plan(loss, params, batch, topology=topology, optimizer=optimizer, **declared)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile in a process that is started as a user's is, not in a fork (`tests/conftest.py`)."""
    monkeypatch.setattr(child, "start", processes.start)


@pytest.mark.usefixtures("own_process")
def test_a_second_time_it_is_known(own_cache: pathlib.Path) -> None:
    first = planned().verify()
    assert first.proof is not None
    assert not first.proof.cached
    assert first.proof.peak_bytes > 0
    assert first.proof.versions["jax"] == jax.__version__
    start = time.perf_counter()
    again = planned().verify()
    assert again.proof == first.proof
    assert again.proof is not None
    assert again.proof.cached
    assert time.perf_counter() - start < first.proof.compile_seconds + 5.0


def test_a_step_compiles_for_a_gpu_that_is_not_here_as_it_is_traced() -> None:
    made = planned("h100:8")
    options = options_to_trace(made.topology)
    assert options == {"xla_gpu_enable_command_buffer": ""}
    found = dataclasses.replace(made, compiler_options=options).verify()
    assert found.proof is not None
    assert found.proof.peak_bytes > 0


class Asked(Exception):
    """The compiler was asked."""


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return a context that holds only if the compiler is asked within it; it is not run for that."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        def ask(*_: Any, **__: Any) -> None:
            raise Asked

        with monkeypatch.context() as patch:
            patch.setattr("meshwright.sharding.verify.verify.run_worker", ask)
            with pytest.raises(Asked):
                yield

    return context


def test_a_damaged_entry_is_compiled_again(own_cache: pathlib.Path, asking: Any) -> None:
    planned().verify()
    (entry,) = own_cache.rglob("answer.json")
    whole = entry.read_text()
    for damaged in ("{", "[]", "{}", whole[: len(whole) // 2], '{"format": 1, "outcome": "compiled"}'):
        entry.parent.mkdir(exist_ok=True)
        entry.write_text(damaged)
        with asking():
            planned().verify()
    entry.parent.mkdir(exist_ok=True)
    entry.write_text("{")
    again = planned().verify()
    assert again.proof is not None
    assert not again.proof.cached
    assert entry.read_text() == whole or '"compile_seconds"' in entry.read_text()


def test_another_program_plan_or_optimizer_is_another_entry(own_cache: pathlib.Path, asking: Any) -> None:
    planned().verify()
    for other in (planned(rows=2 * ROWS), planned(mesh={"tensor": 2})):
        with asking():
            other.verify()
    with asking():
        verify(planned(), *program()[:3], optax.sgd(0.1))
    assert planned(rows=2 * ROWS).verify().proof.cached is False  # type: ignore[union-attr]
    assert len(list(own_cache.rglob("answer.json"))) == 2


def test_an_entry_is_known_by_the_efficiencies_it_was_read_with(
    monkeypatch: pytest.MonkeyPatch, asking: Any
) -> None:
    """And by no others: what is left free of a device's memory changes nothing of what was compiled."""
    planned().verify()
    record = calibration_for("cpu")

    def read_with(**changed: float) -> None:
        replaced = dataclasses.replace(record, **changed)
        monkeypatch.setattr("meshwright.sharding.verify.verify.calibration_for", lambda _: replaced)

    read_with(usable_memory=0.5)
    assert verify(planned(), *program()).cached
    for name in ("memory_efficiency", "fusion_efficiency", "product_cycles", "fabric_efficiency"):
        read_with(**{name: 0.5 * getattr(record, name)})
        with asking():
            verify(planned(), *program())


def test_a_proof_is_kept_in_the_plan(tmp_path: pathlib.Path) -> None:
    made = planned().verify()
    made.save(tmp_path / "x.plan.json")
    assert Plan.load(tmp_path / "x.plan.json").proof == made.proof


def test_a_saved_proof_names_no_place_of_this_machine(tmp_path: pathlib.Path) -> None:
    made = planned().verify()
    assert made.proof is not None
    sources = [row.source for row in (*made.proof.buffers, *made.proof.lines) if row.source is not None]
    assert any(source.file.endswith("test_verify.py") for source in sources)
    made.save(tmp_path / "x.plan.json")
    written = (tmp_path / "x.plan.json").read_text()
    assert '"file": "/' not in written
    assert str(pathlib.Path(__file__).parents[3]) not in written


def test_a_loaded_plan_is_given_its_program(tmp_path: pathlib.Path) -> None:
    planned().save(tmp_path / "x.plan.json")
    loaded = Plan.load(tmp_path / "x.plan.json")
    with pytest.raises(
        UserError, match=r"knows no loss; write plan.verify\(loss, params, batch, optimizer\)"
    ):
        loaded.verify()
    assert loaded.verify(*program()).proof is not None
    with pytest.raises(UserError, match="has shape"):
        loaded.verify(*program(width=2 * WIDTH))


def test_no_time_left() -> None:
    verdict = verify(planned(), *program(), limits=Limits(seconds=0.2))
    assert (verdict.outcome, verdict.cached) == ("timed_out", False)
    assert "longer than 0.2 s" in verdict.message
    # It says nothing of the plan, so that it is not remembered.
    assert verify(planned(), *program()).fits


@pytest.mark.usefixtures("own_process")
def test_no_memory_left_for_the_compiler() -> None:
    verdict = verify(planned(), *program(), limits=Limits(memory_bytes=32 * 2**20))
    assert verdict.outcome == "too_large"
    assert "its limit is 0.0 GiB" in verdict.message
    with pytest.raises(UserError, match="could not be verified: the compiler took"):
        planned().verify(limits=Limits(memory_bytes=32 * 2**20))


@pytest.mark.usefixtures("own_process")
def test_a_killed_child() -> None:
    def kill() -> None:
        while not (found := children()):
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(found[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    verdict = verify(planned(), *program())
    killer.join()
    assert verdict.outcome == "died"
    assert "was ended by SIGKILL" in verdict.message


def children() -> list[int]:
    """Return the workers that this process started."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            words = (path.parent / "cmdline").read_bytes()
        except (OSError, IndexError, ValueError):
            continue
        if parent == os.getpid() and b"meshwright.sharding.verify.worker" in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.usefixtures("own_process")
def test_no_child_is_left_when_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(child, "_watch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        verify(planned(), *program())
    assert children() == []


def test_a_topology_without_a_compiler_is_refused() -> None:
    with pytest.raises(UserError, match="no compiler for mi300x"):
        planned("mi300x:1x8").verify()


def test_what_is_stored_alone_tells_that_it_does_not_fit() -> None:
    loss, params, batch, optimizer = program(width=40960)
    made = planned("v5e:2x2", width=1024).resized(params, batch)
    start = time.perf_counter()
    verdict = verify(made, loss, params, batch, optimizer)
    assert verdict.outcome == "out_of_memory"
    assert "parameters, moments and batch alone take" in verdict.message
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize(("topology", "quick"), [("v5e:2x4", False), ("v5e:2x4", True), ("h100:8", False)])
def test_what_is_too_large_is_said_and_remembered(topology: str, quick: bool) -> None:
    """A product of whole rows whose result no device holds: what is stored is small."""
    capacity = Topology.parse(topology).chip.hbm_bytes
    assert capacity is not None

    def huge(params: Any, batch: Any) -> Any:
        scores = batch["x"] @ params["w"]
        return jnp.sum(jnp.flip(scores, axis=0) * scores)

    rows = 8 * int(capacity // 4 // 2048)
    shape = jax.ShapeDtypeStruct
    params, optimizer = {"w": shape((8, 2048), "float32")}, optax.sgd(1.0)
    batch = {"x": shape((rows, 8), "float32")}
    small = plan(huge, params, {"x": shape((8, 8), "float32")}, topology=topology, optimizer=optimizer)
    made = small.resized(params, batch)
    verdict = verify(made, huge, params, batch, optimizer, quick=quick)
    assert verdict.outcome == "out_of_memory"
    assert verdict.peak_bytes > verdict.capacity_bytes > 0.7 * capacity
    assert "too much" in verdict.message
    assert verify(made, huge, params, batch, optimizer, quick=quick).cached


def test_the_key_changes_with_any_fact() -> None:
    facts = {"plan": {"mesh": {"data": 8}}, "versions": {"jax": "1"}}
    keys = {cache.key_of(facts), cache.key_of({**facts, "versions": {"jax": "2"}}), cache.key_of({})}
    assert len(keys) == 3
