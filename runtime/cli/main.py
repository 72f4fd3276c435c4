"""The command line: each command is a few lines over a function that a notebook can call too."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import pathlib
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...sharding.errors import UserError
from ...sharding.words import first_of
from ..errors import EXIT_INTERRUPTED, RunError, exit_code

if TYPE_CHECKING:
    from ...sharding.cost.measured import Measurement

app = typer.Typer(
    name="meshwright",
    help="Train a model written for one device on many.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[pathlib.Path, typer.Argument(metavar="CONFIG", help="YAML file of settings.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value]...", help="Settings that take the place of the file's."),
]
RunFolderPath = Annotated[pathlib.Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
# Seconds after which a command that is still silent says what it does.
_SILENCE = 10.0

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command(short_help="Train a model, or go on where a run stopped.")
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    topology: Annotated[
        str | None, typer.Option(help="Devices to train on, e.g. cpu:8; the same as topology=cpu:8.")
    ] = None,
) -> None:
    """Train a model; the same command again goes on where it stopped."""
    from ..config import load

    chosen = [] if topology is None else [f"topology={topology}"]
    # Before what trains is imported, JAX above all: a mistake in the settings is told at once.
    settings = load(config, [*(overrides or []), *chosen])
    from ..train import train as run

    raise typer.Exit(run(settings))


@app.command(short_help="Find the fastest layout, and have the compiler prove it.")
def plan(
    config: Annotated[
        pathlib.Path | None, typer.Argument(metavar="CONFIG", help="YAML file of settings.")
    ] = None,
    overrides: Overrides = None,
    topology: Annotated[
        str | None, typer.Option(help="Devices to plan for, e.g. v5p:4x4x8; they need not be here.")
    ] = None,
    why: Annotated[
        str | None, typer.Option(help="Explain an axis (tensor, tensor=8), a dimension or a parameter.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Have the real compiler of the topology compile the step.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Run the model in small as planned, and compare with it run plainly."),
    ] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="With --verify: stop where the step is scheduled, for TPUs several times sooner."
        ),
    ] = False,
    top: Annotated[int, typer.Option(help="With --verify: compile so many of the best and choose.")] = 1,
    compare: Annotated[
        tuple[pathlib.Path, pathlib.Path] | None,
        typer.Option(metavar="A.plan.json B.plan.json", help="Put two saved plans side by side."),
    ] = None,
    save: Annotated[pathlib.Path | None, typer.Option(help="Write the plan here.")] = None,
    html: Annotated[pathlib.Path | None, typer.Option(help="Write the plan as a page here.")] = None,
    as_json: Json = False,
) -> None:
    """Find the fastest layout of a config's model on a topology, say why, and have the compiler prove it."""
    if compare is not None:
        from ..train.planning import compare_plans

        _print(compare_plans(*compare, as_json=as_json))
        return
    if config is None:
        raise UserError("give a CONFIG to plan for, or --compare with two saved plans")
    if top != 1 and not verify:
        raise UserError(f"--top {top} chooses among compiled plans; add --verify")
    if quick and not verify:
        raise UserError("--quick is a way to verify; add --verify")
    from ..config import load

    with _without_collector():
        settings = load(config, overrides or [])
        from ..hosts.simulated import leave_devices
        from ..train.planning import facts, needs_devices, plan_config, write_files

        if not needs_devices(settings, topology):
            # What a model of the user's works out for real while it is built, even a key, starts JAX.
            leave_devices()
        with _said_if_long("still planning: tracing the model and searching its layouts"):
            planned = plan_config(settings, topology)
        work = "scheduling" if quick else "compiling"
        with _said_if_long(f"{work} for {planned.plan.topology}; a large step takes minutes, 15 at most"):
            found = planned.verified(top, quick=quick).plan if verify else planned.plan
    answer = None if why is None else found.explain(why)
    write_files(found, plan_file=save, page=html)
    if check:
        _check(settings, found, facts(found, planned.seconds, answer) if as_json else None)
    if as_json:
        print(json.dumps(facts(found, planned.seconds, answer)))
    elif answer is not None:
        print(answer)
    else:
        from ...sharding.report.plan import plan_document
        from ...sharding.report.terminal import Printed

        _show(Printed(plan_document(found)))


def _check(settings: Any, found: Any, facts: dict[str, Any] | None) -> None:
    """Print how a plan did in small, with its `facts` as JSON where these are given; exit with 1 if badly."""
    from ...sharding.report.terminal import Printed
    from ..train.check import check_document, check_plan

    with _said_if_long("running the model in small, as planned and plainly"):
        checked = check_plan(settings, found)
    if facts is None:
        _show(Printed(check_document(found, checked)))
    else:
        print(json.dumps({**facts, "check": checked.to_dict()}))
    raise typer.Exit(int(not checked.passes))


@app.command(short_help="Train in several processes on this machine.")
def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(help="Real processes on this machine.")] = 1,
) -> None:
    """Train in several real processes on this machine, joined over loopback."""
    from ..launch import launch_training

    raise typer.Exit(launch_training(config, overrides or [], processes))


@app.command(short_help="Say where the steps' time went.")
def profile(
    run: Annotated[
        pathlib.Path, typer.Argument(metavar="RUN", help="Folder of a run, or of any traces, or one trace.")
    ],
    as_json: Json = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Refine the record of the run's chip by its trace.")
    ] = False,
    out: Annotated[
        pathlib.Path | None,
        typer.Option(help="Calibration that --calibrate refines or writes; one in the cache if not given."),
    ] = None,
) -> None:
    """Say where the steps' time went in the trace that a run, or any JAX program, captured."""
    from ..profiling import print_report, profile_run

    if calibrate and as_json:
        raise UserError(
            "--calibrate writes JSON and prints none; leave --json out, or name its file by --out FILE"
        )
    if out is not None and not calibrate:
        raise UserError(f"--out {out} is where --calibrate writes; add --calibrate")
    if calibrate:
        _refine(run, out)
        return
    found = profile_run(run)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        print_report(found)


def _refine(run: pathlib.Path, out: pathlib.Path | None) -> None:
    """Write the calibration that a run's trace comes to, from the one that is there."""
    from ...sharding.cost.measured import load
    from ..calibrate.measure import kept, proposed
    from ..calibrate.traced import refined

    path = out

    def known(chip: str, version: str) -> Measurement | None:
        nonlocal path
        path = kept(chip, version) if path is None else path
        return load(path) if path is not None and path.exists() else None

    found, kinds = refined(run, known)
    path = proposed(found) if path is None else path
    _keep(found, path, asked=out is not None)
    for kind in kinds:
        typer.echo(str(kind))
    typer.echo(f"{path} (digest {found.digest}); a config takes it up with `calibration: {path}`")


def _keep(found: Measurement, path: pathlib.Path, *, asked: bool) -> None:
    """Write a calibration, and make the folder for it where it was not asked for but is the cache's."""
    from ...sharding.cost.measured import save

    if not asked:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
    save(found, path)


@app.command()
def checkpoint(
    run: RunFolderPath,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every checkpoint and check its fingerprints.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the checkpoints of a run."""
    from ..checkpoint.records import committed, described, plain, table

    if not run.is_dir():
        raise UserError(f"there is no run folder at {run}")
    if verify:
        from ..checkpoint import list_checkpoints
        from ..hosts.simulated import leave_devices

        leave_devices()
        records = list_checkpoints(run, verify=True)
    else:
        records = [described(path) for path in committed(run)]
    if as_json:
        print(json.dumps([plain(record) for record in records]))
    elif not records:
        below = sorted(path.parent for path in run.glob("*/checkpoints"))
        print(f"{run} has no checkpoint" + (f"; there are runs in it: {first_of(below)}" if below else ""))
    else:
        _show(table(records, verified=verify))
    raise typer.Exit(int(any(record.fault for record in records)))


@app.command(short_help="Print all settings and what they mean.")
def config(
    file: Annotated[
        pathlib.Path | None, typer.Argument(metavar="[CONFIG]", help="Print this file resolved.")
    ] = None,
    overrides: Overrides = None,
    presets: Annotated[bool, typer.Option("--presets", help="List the models' presets.")] = False,
) -> None:
    """Print every setting with its type, default and meaning, or a config file as resolved."""
    from ..config import describe_presets, describe_settings, dump, load

    if presets:
        _show(describe_presets())
    elif file is not None:
        print(dump(load(file, overrides or [])), end="")
    else:
        print(describe_settings())


@app.command(short_help="Time what the devices here reach.")
def calibrate(
    out: Annotated[
        pathlib.Path | None,
        typer.Option(help="File to write; one of this chip and JAX in the cache if not given."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Time for it; what is left when it is over is left out.")
    ] = 150.0,
    simulated: Annotated[
        int | None, typer.Option(help="Calibrate so many simulated devices of this CPU.")
    ] = None,
) -> None:
    """Time what the devices here reach, so that plans with `calibration: FILE` are estimated by it."""
    from ..hosts.simulated import simulate

    if simulated is not None:
        simulate(simulated)
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"{out} cannot be written: there is no folder {out.parent}")
    from ..calibrate import calibrate as measure
    from ..calibrate.measure import line, proposed

    found = measure(seconds, said=lambda row: typer.echo(line(row)))
    path = proposed(found) if out is None else out
    _keep(found, path, asked=out is not None)
    for name, value in found.efficiencies.items():
        typer.echo(f"{name} = {value:g}")
    typer.echo(f"{path} (digest {found.digest}); a config takes it up with `calibration: {path}`")


@app.command(short_help="Say what is here, and what is wrong.")
def doctor(
    as_json: Json = False,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Compare kernels of attention with plain float32 on the device here."),
    ] = False,
) -> None:
    """Say what is here (versions, devices, hosts, compilers, cache) and what is wrong."""
    from ..doctor import examine, render

    if kernels:
        from ..doctor.kernels import compare_kernels

        findings = list(compare_kernels())
    else:
        findings = examine()
    if as_json:
        print(json.dumps([finding.to_dict() for finding in findings]))
    else:
        _show(render(findings))
    raise typer.Exit(int(any(finding.status == "bad" for finding in findings)))


@contextlib.contextmanager
def _said_if_long(words: str) -> Iterator[None]:
    """Say `words` on stderr where the block takes long."""
    timer = threading.Timer(_SILENCE, lambda: print(words, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Leave cyclic garbage to the command's end: of two seconds, looking for it would take a tenth."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    # Orbax would have each line begin with the name of the module that it comes from.
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        app()
    except (UserError, RunError) as error:
        # Ctrl-C within a function of the user's can come out as an error of that.
        if isinstance(error, UserError) and _was_interrupted(error):
            sys.exit(EXIT_INTERRUPTED)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        # Ctrl-C while a library starts can come out as that library's own error.
        if _was_interrupted(error):
            sys.exit(EXIT_INTERRUPTED)
        raise


def _was_interrupted(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _print(what: Any) -> None:
    print(what) if isinstance(what, str) else _show(what)


def _show(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)
