"""Real traces of real steps, from capture to report, and what is said when there is nothing to read."""

import gzip
import inspect
import json
import shutil
from pathlib import Path

import pytest
from meshwright.runtime.profiling import (
    ProfileWindow,
    capture,
    profile_run,
    read_profile,
    report,
    save_program,
)
from meshwright.runtime.profiling.marker import mark
from meshwright.sharding import plan
from meshwright.sharding.errors import UserError

LAYERS = 3


def build_step():
    """Return a compiled step on 8 devices that gathers over fsdp in a loop and reduces over other axes."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def gather(weight):
        return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, PartitionSpec()))

    def reduce(value):
        spec = PartitionSpec("tensor")
        summed = jax.shard_map(
            lambda v: jax.lax.psum(v, "tensor"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec()
        )
        return summed(value)

    def step(weights, x):
        def layer(x, weight):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ gather(weight)), batch), None

        x, _ = jax.lax.scan(layer, x, weights)
        return weights * 0.5, jnp.mean(x**2) + reduce(weights[0, 0]).sum()

    sharded = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    weights = jax.device_put(jnp.ones((LAYERS, 16, 16)), sharded)
    x = jax.device_put(jnp.ones((32, 16)), batch)
    compiled = jax.jit(step, out_shardings=(sharded, None), donate_argnums=0).lower(weights, x).compile()
    return compiled, mesh, weights, x, inspect.getsourcelines(gather)[1] + 1


def train(directory, *, start_step, num_steps, steps=6, save=True):
    compiled, mesh, weights, x, gather_line = build_step()
    if save:
        save_program(directory, compiled, mesh)
    with ProfileWindow(start_step=start_step, num_steps=num_steps, directory=directory) as window:
        for step in range(steps):
            window.on_step_start(step)
            with window.data_wait():
                pass
            weights, loss = compiled(weights, x)
            window.on_step_end(step, loss)
    return gather_line


@pytest.mark.devices(8)
def test_a_captured_window_says_where_every_step_went(tmp_path):
    gather_line = train(tmp_path / "run" / "profile", start_step=2, num_steps=3)
    profile = profile_run(tmp_path / "run")

    assert [step.step for step in profile.by_step()] == [2, 3, 4]
    assert profile.devices == tuple(f"cpu:{number}" for number in range(8))
    assert len(profile.steps) == 3 * 8
    assert (profile.module, profile.mesh) == ("jit_step", {"data": 2, "fsdp": 2, "tensor": 2})
    for step in profile.steps:
        parts = step.compute_seconds + step.collective_seconds + step.copy_seconds
        parts += step.data_wait_seconds + step.idle_seconds
        assert parts == pytest.approx(step.wall_seconds, rel=1e-6)
        assert step.wall_seconds > 0
        assert step.compute_seconds > 0
        counts = {(c.kind, c.axes): c.count for c in step.collectives}
        assert counts["all_gather", "fsdp"] == LAYERS
        assert counts["all_reduce", "data×fsdp"] == 1
        assert counts["all_reduce", "tensor"] == 1

    gathers = [o for o in profile.operations if o.kind == "all_gather(fsdp)"]
    assert sum(o.count for o in gathers) == LAYERS
    assert {o.source for o in gathers} <= {
        f"{__file__}:{line}" for line in range(gather_line - 1, gather_line + 20)
    }
    assert sum(o.share for o in profile.operations) <= 1
    assert sum(o.seconds for o in profile.operations) == pytest.approx(
        profile.mean().compute_seconds + profile.mean().collective_seconds
    )
    assert [(step.process, step.step) for step in profile.host_steps] == [(0, 2), (0, 3), (0, 4)]
    assert all(0 < step.data_wait_seconds < step.wall_seconds for step in profile.host_steps)


@pytest.mark.devices(8)
def test_a_report_and_a_record_say_the_same(tmp_path):
    from rich.console import Console

    train(tmp_path, start_step=1, num_steps=2)
    profile = read_profile(tmp_path)
    record = json.loads(json.dumps(profile.to_dict()))
    assert record["mean"]["compute_seconds"] == profile.mean().compute_seconds
    assert len(record["steps"]) == 16

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report(profile))
    shown = console.export_text()
    for said in (
        "jit_step on 8 cpu devices, data=2 × fsdp=2 × tensor=2",
        "all_gather",
        "data×fsdp",
        "test_read.py:",
    ):
        assert said in shown
    assert f"{profile.mean().wall_seconds * 1e3:.3f}" in shown


def planned(mesh):
    """Return a searched-for plan of a small product on 8 simulated devices with these axes."""
    import jax

    def loss(params, batch):
        return ((batch["x"] @ params["up"]) ** 2).mean()

    params = {"up": jax.ShapeDtypeStruct((16, 16), "float32")}
    batch = {"x": jax.ShapeDtypeStruct((32, 16), "float32")}
    return plan(loss, params, batch, topology="cpu:8", mesh=mesh)


@pytest.mark.devices(8)
def test_what_the_plan_was_to_cost_stands_beside_what_it_did(tmp_path):
    from rich.console import Console

    run = tmp_path / "run"
    train(run / "profile", start_step=1, num_steps=1)
    assert profile_run(run).to_dict()["estimate"] is None

    made = planned({"data": 2, "fsdp": 2, "tensor": 2})
    made.save(run / "plan.json")
    profile = profile_run(run)
    assert profile.to_dict()["estimate"] == made.estimate.to_dict()
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report(profile))
    (row,) = [line for line in console.export_text().splitlines() if "estimate │" in line]
    wall, compute, collectives, copies, waited, idle = (
        cell.strip() for cell in row.strip("│").split("│")[1:]
    )
    assert (wall, waited) == (f"{made.estimate.step_seconds * 1e3:.3f}", "-")
    parts = (compute, collectives, copies, idle)
    assert sum(map(float, parts)) == pytest.approx(float(wall), abs=2e-3)

    planned({"data": 8}).save(run / "plan.json")
    after = profile_run(run)
    assert after.estimate is None
    assert any("another plan" in note for note in after.notes)


@pytest.mark.devices(8)
def test_without_a_saved_program_the_traces_own_says_lines_and_how_many_devices_take_part(tmp_path):
    train(tmp_path, start_step=1, num_steps=1, save=False)
    profile = read_profile(tmp_path)
    kinds = {(c.kind, c.axes) for c in profile.mean().collectives}
    assert ("all_gather", "groups of 2") in kinds
    assert any("the trace's own" in note for note in profile.notes)
    assert any((o.source or "").startswith(__file__) for o in profile.operations)


@pytest.mark.devices(8)
def test_a_trace_of_unnumbered_steps_is_divided_by_executions(tmp_path):
    import jax

    compiled, mesh, weights, x, _ = build_step()
    save_program(tmp_path, compiled, mesh)
    with capture(tmp_path):
        for _ in range(2):
            weights, loss = compiled(weights, x)
        jax.block_until_ready((weights, loss))
    alone = read_profile(tmp_path)
    assert [step.step for step in alone.by_step()] == [0, 1]
    # Of two hosts whose names end alike neither is lost, and a packed copy is no third.
    (trace,) = tmp_path.rglob("*.xplane.pb")
    for name in ("node-a_01", "node-b_01"):
        shutil.copy(trace, trace.with_name(f"{name}.xplane.pb"))
    (trace.with_name("node-b_01.xplane.pb.gz")).write_bytes(gzip.compress(trace.read_bytes()))
    trace.unlink()
    both = read_profile(tmp_path)
    assert len(both.files) == 2
    assert len(both.steps) == 2 * len(alone.steps)
    # Sessions lie in folders of their own, one of each host where their clocks differ: which is read is said.
    (trace.parent / "node-b_01.xplane.pb.gz").unlink()
    later = trace.parent.with_name("later")
    later.mkdir()
    shutil.move(trace.with_name("node-b_01.xplane.pb"), later)
    (note,) = (note for note in read_profile(tmp_path).notes if "folders with traces" in note)
    assert note.startswith(
        f"of 2 folders with traces in {tmp_path} the newest is read, {trace.parent.parent}"
    )


@pytest.mark.devices(8)
def test_a_damaged_profile_is_named_in_one_sentence(tmp_path):
    train(tmp_path / "profile", start_step=1, num_steps=1, steps=2)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    whole = trace.read_bytes()
    trace.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"truncated: {len(whole) // 2} of {len(whole)} bytes"):
        profile_run(tmp_path)
    trace.write_bytes(whole)
    program = tmp_path / "profile" / "program" / "step.hlo.txt.gz"
    text = program.read_bytes()
    program.write_bytes(text[: len(text) // 2])
    with pytest.raises(UserError, match=r"the saved program in .* is damaged"):
        profile_run(tmp_path)
    shutil.rmtree(program.parent)
    assert profile_run(tmp_path).mesh == {}


def test_a_missing_run_and_a_run_without_a_profile_say_so(tmp_path):
    with pytest.raises(UserError, match="there is no run folder at"):
        profile_run(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"captured no profile: train with profile.start_step=10"):
        profile_run(tmp_path)
    Path(tmp_path, "profile").mkdir()
    with pytest.raises(UserError, match=r"no profile was captured in .*: train with"):
        profile_run(tmp_path)
    mark(tmp_path / "profile", 0, (20, 2))
    with pytest.raises(UserError, match=r"or died in it and left capturing_0\.json: remove that file"):
        profile_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("host.pt.trace.json.gz", "holds no profile of JAX's: host.pt.trace.json.gz is a trace for Perfetto"),
        ("perfetto_trace.json.gz", "perfetto_trace.json.gz is a trace for Perfetto, as JAX writes"),
        ("session.zip", "session.zip is packed: unpack it first"),
        ("report.nsys-rep", "report.nsys-rep is a report of Nsight Systems"),
        ("notes.txt", "has captured no profile"),
    ],
)
def test_a_folder_of_another_profilers_files_says_what_they_are(tmp_path, name, words):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=words):
        profile_run(tmp_path)


def test_traces_of_different_programs_in_one_folder_are_not_taken_for_one(tmp_path):
    import jax
    import jax.numpy as jnp

    together = tmp_path / "together"
    together.mkdir()
    # Made before: what makes an array is a program of both.
    x = jax.block_until_ready(jnp.ones(8))
    for name, function in {"one": jnp.sin, "two": jnp.cumsum}.items():
        with capture(tmp_path / name):
            jax.block_until_ready(jax.jit(function)(x))
        (trace,) = (tmp_path / name).rglob("*.xplane.pb")
        trace.rename(together / f"{name}.xplane.pb")
    with pytest.raises(UserError, match=r"ran no program together, such as one\.xplane"):
        profile_run(together)
