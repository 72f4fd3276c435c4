"""A profile as tables for a terminal or a notebook."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...sharding.plans.estimate import Estimate
from .profile import PipelineTime, Profile, StepTime
from .window import SESSIONS

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


def report(profile: Profile, *, top: int = 12) -> Group:
    """Return tables of the steps, the collectives and the `top` operations, for rich to print."""
    from rich.console import Group
    from rich.text import Text

    mesh = " × ".join(f"{name}={size}" for name, size in profile.mesh.items() if size > 1)
    what = profile.module or ("a program without a name" if profile.steps else "no steps")
    number = len(profile.devices)
    head = f"{what} on {number} {profile.platform} device{'s' * (number > 1)}" + (f", {mesh}" if mesh else "")
    parts = [Text(head, style="bold"), _steps_table(profile)]
    if not profile.steps or len(profile.programs) > 1:
        parts.append(_programs_table(profile))
    if profile.mean().collectives:
        parts.append(_collectives_table(profile))
    if profile.pipeline is not None:
        parts.append(_pipeline_table(profile.pipeline, profile.mean().wall_seconds))
    parts.append(_operations_table(profile, top))
    placed, total = profile.placed
    parts.append(Text(f"{placed} of {total} {_OPERATIONS.get(profile.platform, 'operations')} placed"))
    if (waited := _host_wait(profile)) is not None:
        parts.append(Text(waited))
    parts += [Text(f"note: {note}", style="dim") for note in profile.notes]
    viewer = Path(profile.files[0]).parent if profile.files else None
    if viewer is not None and viewer.parts[-3:-1] == SESSIONS.parts:
        parts.append(
            Text(f"open in XProf: {viewer.parents[2]}; in Perfetto: {viewer}/*.trace.json.gz", style="dim")
        )
    return Group(*parts)


_PIPE_WIDTH = 120
# Steps that a table shows one by one; their mean is of all.
_STEPS = 20
# What runs on a device of each platform, in its own word.
_OPERATIONS = {"gpu": "kernels"}
# The longest name of a kernel that a table shows; templates of C++ run to hundreds of characters.
_NAME_WIDTH = 72


def print_report(profile: Profile, *, top: int = 12) -> None:
    """Print `report(profile)` to the terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        # A pipe or a file has no width of its own; rich would fold at 80 columns.
        console.width = max(console.width, _PIPE_WIDTH)
    console.print(report(profile, top=top))


def _steps_table(profile: Profile) -> Table:
    from rich.table import Table

    of = "a step" if profile.steps else "of the whole trace"
    table = Table(title=f"Milliseconds {of}, mean over devices", title_justify="left")
    gaps = any(step.gap_seconds for step in profile.steps)
    for column in ("step", "wall", "compute", "collectives", "copies", "data wait", "idle"):
        table.add_column(column, justify="right")
    if gaps:
        table.add_column("gap before", justify="right")

    def add(name: str, step: StepTime) -> None:
        table.add_row(name, *map(_ms, _parts(step)), *([_ms(step.gap_seconds)] if gaps else []))

    steps = profile.by_step()
    for step in steps[:_STEPS]:
        add(str(step.step), step)
    if len(steps) > _STEPS:
        table.add_row(f"{len(steps) - _STEPS} more")
    mean = profile.mean()
    table.add_section()
    add("mean", mean)
    table.add_row("share", *(_share(value, mean.wall_seconds) for value in _parts(mean)))
    if profile.estimate is not None:
        table.add_section()
        table.add_row("estimate", *_estimated(profile.estimate))
    return table


def _estimated(estimate: Estimate) -> tuple[str, ...]:
    """Return the cells of `_parts` for an estimate, which knows nothing of data."""
    compute = collectives = copies = 0.0
    for item, seconds in estimate.time.items():
        kind, _, over = item.partition("/")
        if kind in ("compute", "optimizer"):
            compute += seconds
        elif over == "host":
            copies += seconds
        elif over:
            collectives += seconds
    idle = estimate.step_seconds - compute - collectives - copies
    parts = (estimate.step_seconds, compute, collectives, copies)
    return *map(_ms, parts), "-", _ms(max(idle, 0.0))


def _programs_table(profile: Profile) -> Table:
    from rich.table import Table

    table = Table(title="Executions by program, all devices", title_justify="left")
    table.add_column("program")
    for column in ("executions", "operations", "busy ms"):
        table.add_column(column, justify="right")
    for program in profile.programs:
        table.add_row(
            program.module or "not said",
            str(program.executions),
            str(program.operations),
            _ms(program.busy_seconds),
        )
    return table


def _collectives_table(profile: Profile) -> Table:
    from rich.table import Table

    mean = profile.mean()
    table = Table(title="Collectives a step", title_justify="left")
    table.add_column("kind")
    table.add_column("mesh axes")
    for column in ("count", "exposed ms", "overlapped ms", "share"):
        table.add_column(column, justify="right")
    for collective in mean.collectives:
        table.add_row(
            collective.kind,
            collective.axes,
            f"{collective.count:g}",
            _ms(collective.exposed_seconds),
            _ms(collective.overlapped_seconds),
            _share(collective.exposed_seconds, mean.wall_seconds),
        )
    return table


def _pipeline_table(pipeline: PipelineTime, wall: float) -> Table:
    from rich.table import Table

    table = Table(title="Pipeline a step, mean over devices", title_justify="left")
    table.add_column("work")
    for column in ("ms", "share"):
        table.add_column(column, justify="right")
    for work, seconds in sorted(pipeline.seconds.items(), key=lambda item: -item[1]):
        table.add_row(work, _ms(seconds), _share(seconds, wall))
    table.add_section()
    bubble = pipeline.bubble_seconds
    table.add_row(f"bubble, {pipeline.waits:.1%} of the layers' ticks", _ms(bubble), _share(bubble, wall))
    if pipeline.predicted_seconds is not None:
        table.add_row("bubble, estimated", _ms(pipeline.predicted_seconds))
    return table


def _operations_table(profile: Profile, top: int) -> Table:
    from rich.table import Table

    shown = profile.operations[:top]
    table = Table(title=f"Top {len(shown)} of {len(profile.operations)} operations", title_justify="left")
    table.add_column("operation", overflow="fold")
    table.add_column("kind")
    for column in ("count", "ms", "share"):
        table.add_column(column, justify="right")
    table.add_column("source", overflow="fold")
    for operation in shown:
        table.add_row(
            _fitting(operation.name),
            operation.kind,
            f"{operation.count:g}",
            _ms(operation.seconds),
            f"{operation.share:.1%}",
            _short(operation.source) if profile.mesh or operation.source else "-",
        )
    return table


def _host_wait(profile: Profile) -> str | None:
    if not profile.host_steps or not profile.steps:
        return None
    waited = sum(step.data_wait_seconds for step in profile.host_steps) / len(profile.host_steps)
    idle = profile.mean().data_wait_seconds
    return f"the host waited {_ms(waited)} ms a step for data; devices stood idle for {_ms(idle)} ms of it"


def _parts(step: StepTime) -> tuple[float, ...]:
    return (
        step.wall_seconds,
        step.compute_seconds,
        step.collective_seconds,
        step.copy_seconds,
        step.data_wait_seconds,
        step.idle_seconds,
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _share(seconds: float, of: float) -> str:
    return f"{seconds / of:.1%}" if of else "-"


def _fitting(name: str) -> str:
    """Return the beginning of a kernel's name without what its templates and arguments are."""
    if len(name) <= _NAME_WIDTH:
        return name
    start = name.removeprefix("void ").partition("<")[0].partition("(")[0]
    return f"{start[:_NAME_WIDTH]}…"


def _short(source: str | None) -> str:
    """The last two parts of a path say which file it is; a made-up operation has none."""
    return "/".join(source.rsplit("/", 2)[-2:]) if source is not None else "made by XLA"
