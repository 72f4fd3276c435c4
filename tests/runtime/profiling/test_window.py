"""When a window captures, what it leaves on disk, and what it refuses."""

import gzip
import json

import pytest
from meshwright.runtime.profiling import ProfileWindow, capture, read_profile, save_program
from meshwright.sharding.errors import UserError


def run(window, steps):
    import jax
    import jax.numpy as jnp

    f = jax.jit(lambda x: x * 2 + 1)
    x = jnp.ones(4)
    seen = []
    for step in steps:
        window.on_step_start(step)
        seen.append(window.active)
        with window.data_wait():
            pass
        x = f(x)
        window.on_step_end(step, x)
    return seen


def numbers(directory):
    return [step.step for step in read_profile(directory).by_step()]


@pytest.mark.devices(1)
def test_only_the_window_is_captured_and_both_viewers_have_their_file(tmp_path):
    with ProfileWindow(start_step=2, num_steps=2, directory=tmp_path) as window:
        assert run(window, range(6)) == [False, False, True, True, False, False]
    assert numbers(tmp_path) == [2, 3]
    session = tmp_path / "plugins" / "profile" / "step_00000002"
    assert sorted(path.name.partition("_0.")[2] for path in session.iterdir()) == [
        "sizes.json",
        "trace.json.gz",
        "xplane.pb",
    ]
    (viewer,) = session.glob("*.trace.json.gz")
    names = {event.get("name") for event in json.loads(gzip.decompress(viewer.read_bytes()))["traceEvents"]}
    assert {"train_step", "data_wait"} <= names
    assert not list(tmp_path.glob(".writing*"))


@pytest.mark.devices(1)
@pytest.mark.parametrize(
    ("start", "steps", "captured"),
    [(0, range(3), [0, 1]), (1, range(2, 5), [2]), (2, range(3), [2])],
    ids=["from the first step", "resumed inside", "left early"],
)
def test_a_window_that_meets_only_a_part_of_its_steps_captures_those(tmp_path, start, steps, captured):
    with ProfileWindow(start_step=start, num_steps=2, directory=tmp_path) as window:
        run(window, steps)
    assert numbers(tmp_path) == captured


@pytest.mark.devices(1)
def test_an_error_in_the_loop_leaves_a_readable_trace_and_no_tracing(tmp_path):
    import jax

    def fail():
        with ProfileWindow(start_step=0, num_steps=5, directory=tmp_path) as window:
            run(window, range(2))
            window.on_step_start(2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.rglob("*.xplane.pb"))
    with capture(tmp_path / "again"):
        jax.numpy.ones(3).block_until_ready()


@pytest.mark.devices(1)
def test_nothing_is_written_without_a_window_or_after_it(tmp_path):
    with ProfileWindow(start_step=None, directory=tmp_path) as window:
        assert not any(run(window, range(3)))
    with ProfileWindow(start_step=1, num_steps=1, directory=tmp_path) as window:
        assert not any(run(window, range(10, 13)))
    assert not list(tmp_path.iterdir())


@pytest.mark.devices(1)
def test_two_traces_at_once_are_refused_and_the_first_survives(tmp_path):
    window = ProfileWindow(start_step=0, num_steps=1, directory=tmp_path / "window")
    with capture(tmp_path / "outer"), pytest.raises(UserError, match="cannot start a profile: "):
        window.on_step_start(0)
    assert list((tmp_path / "outer").rglob("*.xplane.pb"))
    assert not list((tmp_path / "window").rglob("*"))


@pytest.mark.parametrize(
    ("wrong", "said"), [((1, 21), "nearest: 20"), ((1, 0), "nearest: 1"), ((-3, 2), "nearest: 0")]
)
def test_nonsense_is_refused(tmp_path, wrong, said):
    with pytest.raises(UserError, match=said):
        ProfileWindow(start_step=wrong[0], num_steps=wrong[1], directory=tmp_path)


@pytest.mark.processes(2, devices=2)
def test_every_process_writes_its_own_file_into_one_session(shared_path):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "fsdp"))
    sharded = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x = jax.jit(lambda: jnp.ones((8, 4)), out_shardings=sharded)()
    compiled = jax.jit(lambda x: (x * 2, x.sum())).lower(x).compile()
    save_program(shared_path, compiled, mesh)
    with ProfileWindow(start_step=1, num_steps=2, directory=shared_path) as window:
        for step in range(4):
            window.on_step_start(step)
            x, total = compiled(x)
            window.on_step_end(step, total)
    multihost_utils.sync_global_devices("written")

    profile = read_profile(shared_path)
    assert len(profile.files) == 2
    assert profile.devices == tuple(f"cpu:{device.id}" for device in jax.devices())
    assert {(step.process, step.step) for step in profile.host_steps} == {(0, 1), (0, 2), (1, 1), (1, 2)}
    for step in profile.steps:
        assert {(c.kind, c.axes): c.count for c in step.collectives} == {("all_reduce", "data×fsdp"): 1}
