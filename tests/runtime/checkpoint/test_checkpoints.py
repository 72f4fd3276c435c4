"""Saving and restoring, through `Checkpoints`."""

from __future__ import annotations

import logging
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from forks import forked
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from meshwright.runtime.checkpoint import CheckpointError, Checkpoints, list_checkpoints
from meshwright.sharding import processes
from meshwright.sharding.errors import UserError

pytestmark = pytest.mark.numerics


def make_mesh(data: int, fsdp: int) -> Mesh:
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices, ("data", "fsdp"))


def make_state(mesh: Mesh, seed: int = 0) -> Any:
    """A training state with every kind of leaf: sharded, replicated, scalar, narrow, keys, empty states."""
    w, table, key = jax.random.split(jax.random.key(seed), 3)
    params = {
        "w": draws.normal(w, (64, 32)),
        "embed": {"table": draws.normal(table, (48, 8)).astype(jnp.bfloat16)},
    }
    state = {
        "step": jnp.int32(seed),
        "params": params,
        "optimizer": optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params),
        "key": jax.random.key_data(key),
        "flags": jnp.array([True, False, True]),
        "bytes": jnp.arange(16, dtype=jnp.int8),
        "float8": jnp.arange(8).astype(jnp.float8_e4m3fn),
    }
    spec = {2: PartitionSpec(("fsdp",)), 1: PartitionSpec(), 0: PartitionSpec()}
    return jax.device_put(state, jax.tree.map(lambda x: NamedSharding(mesh, spec[x.ndim]), state))


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(directory: pathlib.Path, mesh: Mesh, *steps: int) -> dict[int, Any]:
    states = {step: make_state(mesh, step) for step in steps}
    with Checkpoints(directory) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, metadata={"position": step})
    return states


def data_files(checkpoint: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)


@pytest.mark.devices(8)
@pytest.mark.parametrize("shape", [(2, 4), (8, 1), (4, 2), (1, 2), (1, 1)])
def test_restores_bit_for_bit_onto_any_mesh(shape, tmp_path) -> None:
    saved = make_state(make_mesh(2, 4))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, saved, metadata={"config": {"layers": 2}}, metrics={"loss": 1.5})
    wanted = abstract(make_state(make_mesh(*shape)))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(wanted)
    assert restored is not None
    assert (restored.step, restored.metadata, restored.metrics) == (
        5,
        {"config": {"layers": 2}},
        {"loss": 1.5},
    )
    assert_same(restored.state, saved)
    for leaf, want in zip(jax.tree.leaves(restored.state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == want.sharding


@pytest.mark.devices(8)
@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys_come_back_as_keys(implementation, tmp_path) -> None:
    def state(mesh: Mesh) -> Any:
        key = jax.random.key(3, impl=implementation)
        spread = NamedSharding(mesh, PartitionSpec("fsdp"))
        whole = NamedSharding(mesh, PartitionSpec())
        return {"key": jax.device_put(key, whole), "keys": jax.device_put(jax.random.split(key, 8), spread)}

    saved, wanted = state(make_mesh(2, 4)), state(make_mesh(1, 2))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.prepare(abstract(saved))
        checkpoints.save(1, saved, metadata={})
        restored = checkpoints.restore(abstract(wanted))
    assert restored is not None
    for name, key in restored.state.items():
        assert (key.dtype, key.sharding) == (wanted[name].dtype, wanted[name].sharding)
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(saved[name]))


@pytest.mark.devices(1)
@pytest.mark.parametrize(
    "keys", [("a/b", ("a", "b")), ("a/b", ("a",)), ("a/b/c", ("a/b",)), ("a/b/c", ("a", "b/c"))]
)
def test_names_that_would_meet_are_told_apart(keys: Any, tmp_path: pathlib.Path) -> None:
    first, rest = keys
    inner: Any = jnp.arange(3.0)
    for key in reversed(rest):
        inner = {key: inner}
    state = {"params": {first: jnp.arange(4.0), **inner}, "optimizer": [{first: jnp.arange(5.0), **inner}]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, metadata={})
        restored = checkpoints.restore(abstract(state))
    assert restored is not None
    assert_same(restored.state, state)


@pytest.mark.devices(8)
def test_a_training_state_that_has_stopped_is_not_saved_and_one_without_the_flag_goes_on(tmp_path) -> None:
    mesh = make_mesh(2, 4)
    old = make_state(mesh)
    flag = jax.device_put(jnp.bool_(False), NamedSharding(mesh, PartitionSpec()))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, old, metadata={})
        restored = checkpoints.restore(abstract({**old, "stopped": flag}))
        assert restored is not None
        assert_same(restored.state, {**old, "stopped": flag})
        with pytest.raises(CheckpointError, match=r"not saved at step 2: a loss or gradient was not finite"):
            checkpoints.save(2, {**old, "stopped": ~flag}, metadata={})
        checkpoints.save(3, restored.state, metadata={})
        restored = checkpoints.restore(abstract(old))
    assert restored is not None
    assert restored.step == 3
    assert_same(restored.state, old)


@pytest.mark.devices(8)
def test_restores_what_one_device_saved_onto_an_explicit_mesh(tmp_path) -> None:
    saved = make_state(make_mesh(1, 1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved, metadata={})
        explicit = Mesh(
            np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2
        )
        restored = checkpoints.restore(abstract(make_state(explicit)))
        assert restored is not None
        assert_same(restored.state, saved)
        checkpoints.save(2, restored.state, metadata={})
    assert all(record.good for record in list_checkpoints(tmp_path, verify=True))


@pytest.mark.devices(8)
def test_state_donated_to_the_next_step_is_saved_as_it_was(tmp_path) -> None:
    state = make_state(make_mesh(2, 4))
    before = jax.tree.map(lambda x: np.array(x), state)
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + x, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.prepare(abstract(state))
        checkpoints.save(1, state, metadata={})
        for _ in range(5):
            state = advance(state)
        restored = checkpoints.restore(abstract(state))
    assert restored is not None
    assert_same(restored.state, before)


@pytest.mark.devices(4)
def test_snapshots_that_share_memory_do_not_share_values(tmp_path) -> None:
    state, before = make_state(make_mesh(2, 2)), {}
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + x, s), donate_argnums=0)
    with Checkpoints(tmp_path, keep_last=None) as checkpoints:
        for step in range(4):
            before[step] = jax.tree.map(lambda x: np.array(x), state)
            checkpoints.save(step, state, metadata={})
            state = advance(state)
        for step, values in before.items():
            restored = checkpoints.restore(abstract(state), step=step)
            assert restored is not None
            assert_same(restored.state, values)


@pytest.mark.devices(1)
def test_empty_folder_restores_nothing(tmp_path) -> None:
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(abstract(make_state(make_mesh(1, 1)))) is None
    assert list_checkpoints(tmp_path / "new") == []


@pytest.mark.devices(2)
def test_saves_that_overlap_are_all_kept(tmp_path, caplog) -> None:
    state = jax.device_put(jnp.ones((4096, 512)), NamedSharding(make_mesh(1, 2), PartitionSpec("fsdp")))
    with Checkpoints(tmp_path, keep_last=None) as checkpoints:
        for step in range(4):
            checkpoints.save(step, {"w": state}, metadata={"position": step})
    assert [record.step for record in list_checkpoints(tmp_path)] == [0, 1, 2, 3]
    assert "waited" in caplog.text


@pytest.mark.devices(1)
def test_metadata_is_told_of_a_checkpoint_without_arrays(tmp_path) -> None:
    save_steps(tmp_path, make_mesh(1, 1), 1, 2)
    shutil.rmtree(tmp_path / "2" / "state")
    newest = list_checkpoints(tmp_path)[-1]
    assert (newest.step, newest.metadata) == (2, {"position": 2})
    assert newest.fault is not None


@pytest.mark.devices(2)
def test_one_flipped_bit_anywhere_is_found_or_harmless(tmp_path, caplog) -> None:
    states = save_steps(tmp_path / "kept", make_mesh(1, 2), 1, 2)
    files = [path.relative_to(tmp_path / "kept") for path in data_files(tmp_path / "kept" / "2")]
    rng = random.Random(7)
    # The largest file holds the arrays; the others have an index, a manifest or a name.
    largest = max(files, key=lambda path: (tmp_path / "kept" / path).stat().st_size)
    found = 0
    for trial, name in enumerate([largest] * 8 + rng.sample(files, 4)):
        directory = tmp_path / str(trial)
        shutil.copytree(tmp_path / "kept", directory)
        damaged = bytearray((directory / name).read_bytes())
        bit = rng.randrange(8 * len(damaged))
        damaged[bit // 8] ^= 1 << bit % 8
        (directory / name).write_bytes(damaged)
        caplog.clear()
        with Checkpoints(directory) as checkpoints:
            restored = checkpoints.restore(abstract(states[2]))
        assert restored is not None
        assert_same(restored.state, states[restored.step])
        if restored.step == 1:
            found += 1
            assert (directory / "damaged" / "2").is_dir()
            assert "checkpoint at step 2 is damaged: " in caplog.text
    assert found >= 8


@pytest.mark.devices(2)
def test_flipped_bit_in_an_array_too_large_for_a_digest_is_found_by_its_fingerprint(tmp_path, caplog) -> None:
    sharding = NamedSharding(make_mesh(1, 2), PartitionSpec("fsdp"))
    states = {s: {"w": jax.device_put(jnp.full((1024, 1024), float(s)), sharding)} for s in (1, 2)}
    with Checkpoints(tmp_path) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, metadata={})
    path = max(data_files(tmp_path / "2"), key=lambda path: path.stat().st_size)
    damaged = bytearray(path.read_bytes())
    assert len(damaged) > 2**20
    damaged[len(damaged) // 3] ^= 4
    path.write_bytes(damaged)
    assert [record.fault for record in list_checkpoints(tmp_path)] == [None, None]
    fault = list_checkpoints(tmp_path, verify=True)[1].fault
    assert fault is not None
    assert fault.startswith("leaf w is not what was saved")
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(states[1]))
    assert restored is not None
    assert restored.step == 1
    assert_same(restored.state, states[1])
    assert "checkpoint at step 2 is damaged: leaf w is not what was saved" in caplog.text


@pytest.mark.devices(1)
@pytest.mark.parametrize("harm", ["truncate", "remove", "manifest", "no manifest"])
def test_damaged_files_are_named_and_the_one_before_is_used(harm, tmp_path, caplog) -> None:
    states = save_steps(tmp_path, make_mesh(1, 1), 1, 2)
    path = max(data_files(tmp_path / "2"), key=lambda path: path.stat().st_size)
    if harm == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "remove":
        path.unlink()
    elif harm == "manifest":
        path = tmp_path / "2" / "manifest.json"
        path.write_text(path.read_text().replace('"position": 2', '"position": 3'))
    else:
        path = tmp_path / "2" / "manifest.json"
        path.unlink()
    assert [record.good for record in list_checkpoints(tmp_path)] == [True, False]
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(states[1]))
    assert restored is not None
    assert (restored.step, restored.metadata) == (1, {"position": 1})
    assert path.name in caplog.text
    assert (tmp_path / "damaged" / "2").is_dir()


@pytest.mark.devices(1)
def test_says_so_when_none_is_whole(tmp_path) -> None:
    states = save_steps(tmp_path, make_mesh(1, 1), 1, 2)
    for step in (1, 2):
        (tmp_path / str(step) / "manifest.json").unlink()
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match=r"is whole \(step 2: manifest"),
    ):
        checkpoints.restore(abstract(states[1]))
    # Starting from nothing is for the user to decide, also the next time.
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="set aside earlier: 1, 2"),
    ):
        checkpoints.restore(abstract(states[1]))


@pytest.mark.devices(1)
def test_an_older_step_may_be_asked_for_and_the_newer_are_then_superseded(tmp_path, caplog) -> None:
    states = save_steps(tmp_path, make_mesh(1, 1), 10, 20)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(states[10]), step=10)
        assert restored is not None
        assert_same(restored.state, states[10])
        checkpoints.save(15, restored.state, metadata={})
        checkpoints.wait()
        assert checkpoints.steps() == [10, 15]
        with pytest.raises(UserError, match="no checkpoint at step 11"):
            checkpoints.restore(abstract(states[10]), step=11)
    assert "step 20 is superseded by step 15" in caplog.text


@pytest.mark.devices(1)
def test_the_step_just_restored_is_not_written_again(tmp_path, caplog) -> None:
    states = save_steps(tmp_path, make_mesh(1, 1), 3)
    written = (tmp_path / "3" / "manifest.json").stat().st_mtime_ns
    with caplog.at_level(logging.INFO), Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(abstract(states[3]))
        checkpoints.save(3, states[3], metadata={})
    assert (tmp_path / "3" / "manifest.json").stat().st_mtime_ns == written
    assert "saved already" in caplog.text


@pytest.mark.devices(1)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {**s, "more": s["step"]}, "has no leaf more"),
        (lambda s: {k: v for k, v in s.items() if k != "key"}, "has a leaf key that this run has not"),
        (
            lambda s: {**s, "step": jnp.zeros(2)},
            r"leaf step is int32\[\] in the checkpoint at step 1 and float32\[2\]",
        ),
    ],
)
def test_a_state_of_another_shape_is_the_users_mistake_and_no_damage(change, said, tmp_path) -> None:
    states = save_steps(tmp_path, make_mesh(1, 1), 1)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=said):
            checkpoints.restore(abstract(change(states[1])))
        assert checkpoints.steps() == [1]


@pytest.mark.devices(1)
@pytest.mark.parametrize(
    ("leaf", "said"),
    [
        (lambda: np.float32(1), "leaf w is a numpy.float32, not a jax.Array"),
        (lambda: 3, "leaf w is a int, not a jax.Array"),
        (lambda: jnp.zeros((0, 3)), r"leaf w of shape \[0, 3\] holds nothing"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(leaf, said, tmp_path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=said):
            checkpoints.save(1, {"w": leaf()}, metadata={})
        with pytest.raises(UserError, match="must be JSON"):
            checkpoints.save(1, {"w": jnp.ones(1)}, metadata={"path": pathlib.Path("x")})
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.devices(1)
def test_a_folder_in_use_is_refused(tmp_path) -> None:
    with Checkpoints(tmp_path), pytest.raises(UserError, match="in use by process"):
        Checkpoints(tmp_path)
    Checkpoints(tmp_path).close()


@pytest.mark.devices(1)
def test_retention_deletes_after_each_save_and_never_the_newest(tmp_path) -> None:
    state = {"w": jnp.ones(4)}
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 6.0, 6: 7.0}
    with Checkpoints(tmp_path, keep_last=1, keep_every=4, keep_best="loss") as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, state, metadata={}, metrics={"loss": loss})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4, 6]


_CHILD = """
    import resource, sys, jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from meshwright.runtime.checkpoint import Checkpoints
    if len(sys.argv) > 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    with Checkpoints(sys.argv[1], keep_last=2) as checkpoints:
        wanted = {"w": jax.ShapeDtypeStruct((2048, 512), jnp.float32, sharding=place)}
        restored = checkpoints.restore(wanted)
        step = 0 if restored is None else restored.step
        if restored is not None:
            assert np.all(np.asarray(restored.state["w"]) == step), "not the state of that step"
        print("at", step, flush=True)
        for step in range(step + 1, step + int(sys.argv[2]) + 1):
            state = {"w": jax.device_put(jnp.full((2048, 512), float(step)), place)}
            checkpoints.save(step, state, metadata={"position": step})
            print("saving", step, flush=True)
"""


def _child(directory: pathlib.Path, count: int, *largest_file_bytes: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    arguments = map(str, (directory, count, *largest_file_bytes))
    command = forked([sys.executable, "-c", textwrap.dedent(_CHILD), *arguments])
    pipe = subprocess.PIPE
    return processes.start(command, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_killed_during_a_save_at_random_moments_the_checkpoint_before_restores(tmp_path) -> None:
    rng, committed = random.Random(3), 0
    for _ in range(4):
        child = _child(tmp_path, 1000)
        assert child.stdout is not None
        start = child.stdout.readline()
        assert start.startswith("at "), child.communicate()[1]
        # What was committed before the kill, and no less, is what the next run starts from.
        assert int(start.split()[1]) >= committed
        child.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.4))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        committed = max((record.step for record in list_checkpoints(tmp_path)), default=0)
    last = _child(tmp_path, 1)
    out, err = last.communicate(timeout=120)
    assert last.returncode == 0, err
    assert out.startswith(f"at {committed}")
    assert all(record.good for record in list_checkpoints(tmp_path, verify=True))
    assert not [path.name for path in tmp_path.iterdir() if "." in path.name[1:]]


def test_a_write_that_fails_in_the_background_is_an_error_in_the_loop(tmp_path) -> None:
    begun = time.monotonic()
    child = _child(tmp_path, 2, 2**20)
    _, err = child.communicate(timeout=240)
    assert child.returncode == 1
    assert f"CheckpointError: the checkpoint at step 1 could not be written to {tmp_path}" in err
    assert "_SignalingThread" not in err
    assert list_checkpoints(tmp_path) == []
    # Orbax's own exit would wait for minutes for the arrays that never came.
    assert time.monotonic() - begun < 100
