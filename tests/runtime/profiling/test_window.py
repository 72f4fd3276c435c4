"""When a window captures, what it leaves on disk, and what it refuses."""

import contextlib
import gzip
import json

import jax.numpy as jnp
import pytest
from meshwright.runtime.profiling import ProfileWindow, capture, read_profile, save_program
from meshwright.runtime.profiling.marker import died_in
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
    said = []
    with ProfileWindow(start_step=start, num_steps=2, directory=tmp_path, say=said.append) as window:
        run(window, steps)
    assert numbers(tmp_path) == captured
    (words,) = said
    if len(captured) == 2:
        assert words.startswith("profile: steps 0 to 1 captured, ")
    else:
        assert words.startswith(f"profile: step 2 captured (asked for: steps {start} to {start + 1}), ")


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


def markers(directory):
    return [path.name for path in directory.glob("capturing_*")]


@pytest.mark.devices(1)
def test_a_file_says_that_a_window_is_open_until_the_steps_after_it_are_done(tmp_path):
    window = ProfileWindow(start_step=2, num_steps=2, directory=tmp_path)
    seen = {}
    for step in range(12):
        run(window, [step])
        seen[step] = markers(tmp_path)
    assert [step for step, found in seen.items() if found] == list(range(2, 9))
    assert died_in(tmp_path, (2, 2)) is None


@pytest.mark.devices(1)
@pytest.mark.parametrize(
    ("error", "left"), [(RuntimeError("illegal address"), True), (UserError("no"), False), (None, False)]
)
def test_the_file_stays_where_an_error_may_be_the_profilers(tmp_path, error, left):
    with (
        contextlib.suppress(RuntimeError, UserError),
        ProfileWindow(start_step=0, num_steps=1, directory=tmp_path) as window,
    ):
        run(window, range(2))
        if error is not None:
            raise error
    assert bool(markers(tmp_path)) == left
    assert (died_in(tmp_path, (0, 1)) is not None) == left
    assert died_in(tmp_path, (0, 2)) is None


@pytest.mark.devices(1)
def test_a_failed_profile_is_said_and_the_steps_go_on(tmp_path):
    said = []
    window = ProfileWindow(start_step=0, num_steps=1, directory=tmp_path / "window", say=said.append)
    with capture(tmp_path / "outer"):
        assert run(window, range(3)) == [False, False, False]
    assert len(said) == 1
    assert said[0].startswith("the profile of step 0 is left out, and training goes on: cannot start")
    assert not markers(tmp_path / "window")

    (tmp_path / "file").write_text("in the way")
    window = ProfileWindow(start_step=0, num_steps=1, directory=tmp_path / "file", say=said.append)
    assert run(window, range(3)) == [False, False, False]
    assert len(said) == 2


@pytest.mark.devices(1)
def test_a_trace_that_cannot_be_written_is_said_and_the_steps_go_on(tmp_path):
    said = []
    window = ProfileWindow(start_step=0, num_steps=1, directory=tmp_path, say=said.append)
    (tmp_path / "plugins").write_text("in the way")
    assert run(window, range(3)) == [True, False, False]
    assert len(said) == 1
    assert said[0].startswith("the profile could not be written, and training goes on: ")


@pytest.mark.devices(1)
def test_the_trace_opens_and_closes_in_quiet_and_is_whole_before_the_next_step(tmp_path):
    states = []

    @contextlib.contextmanager
    def quiet():
        states.append(["before", window.active])
        yield
        states[-1].append(window.active)

    window = ProfileWindow(start_step=1, num_steps=1, directory=tmp_path)
    x = jnp.ones(4)
    for step in range(3):
        window.on_step_start(step, quiet)
        done = window.on_step_end(step, x, quiet)
        assert (done is not None) == (step < 2)
        assert len(list(tmp_path.rglob("*.xplane.pb"))) == (step > 0)
    assert states == [["before", False, True], ["before", True, False]]


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
