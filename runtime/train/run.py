"""The training loop."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from ...sharding.errors import UserError, one_line
from ...sharding.files import user_cache
from ...sharding.verify.worker import peak_of
from ...sharding.xla.options import options_to_trace
from ..checkpoint import Checkpoints
from ..checkpoint.agreement import from_first
from ..config import Config
from ..faults import StepWatchdog, StopSignal, fail_fast
from ..hosts import Hosts, initialize
from ..profiling import ProfileWindow, profile_run, save_program
from ..profiling.marker import died_in
from .conclude import check_sample, conclude
from .console import console
from .job import Job, build_job
from .loop import TrainingLoop
from .metrics import Collector, JsonLines, Sink, TensorBoard, check_metrics
from .planning import described_topology
from .prediction import FirstSteps, Prediction, StepCost
from .rounds import RoundsWatch, exchange_axes
from .run_folder import RunFolder

if TYPE_CHECKING:
    from jax.stages import Compiled, Lowered

    from ...sharding.transform.check import AccumulationCheck


def train(config: Config) -> int:
    """Train as `config` says, going on from the newest whole checkpoint of its run folder.

    Returns the exit code: 0 when the run ended, or was asked to stop and saved its state.
    Raises UserError for what the user has to change; then nothing has been written.
    """
    folder = RunFolder(config.run_folder)
    folder.check(config)
    if config.metrics.tensorboard:
        TensorBoard.check()
    use_compilation_cache(config.compilation_cache)
    hosts = initialize(config.hosts, simulated_devices=simulated_devices(config))
    with fail_fast():
        job = build_job(config)
        check_sample(config, job)
        # Traced before anything is written: it may turn out that the plan cannot be carried out.
        update = job.step.update.lower(job.step.abstract_state, job.abstract_batch)
        check_metrics(update.out_info[1])
        if hosts.is_main:
            folder.open(config, job.plan)
        try:
            return _run(config, job, update, folder, hosts)
        finally:
            folder.close()


def simulated_devices(config: Config) -> int | None:
    """Number of simulated CPU devices that the config or its plan file asks for; None for real ones."""
    topology = described_topology(config)
    return topology.num_devices if topology is not None and topology.chip.platform == "cpu" else None


def use_compilation_cache(folder: str | None) -> None:
    """Keep compiled programs in `folder` between runs; ``auto`` is the user's cache folder, None is none."""
    import jax

    if folder is None:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if folder == "auto":
        folder = str(user_cache() / "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _run(config: Config, job: Job, update: Lowered, folder: RunFolder, hosts: Hosts) -> int:
    import jax

    keep = config.checkpoint
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        checkpoints = stack.enter_context(
            Checkpoints(
                folder.checkpoints,
                keep_last=keep.keep_last,
                keep_every=keep.keep_every,
                keep_best=keep.keep_best,
                best_mode=keep.best_mode,
            )
        )
        window = stack.enter_context(_window(config, folder, hosts))
        watchdog = stack.enter_context(StepWatchdog(config.train.step_timeout_seconds))
        # Innermost: what closes above would wait for processes that wait for this one.
        with fail_fast():
            restored = checkpoints.restore(job.step.abstract_state)
            if restored is not None:
                _check_same_data(restored.metadata, job)
            start = 0 if restored is None else restored.step
            if hosts.is_main:
                _announce(config, job, hosts, start)
            state = job.step.init(jax.random.key(config.seed)) if restored is None else restored.state
            if job.plan.microbatches > 1 and config.train.check_accumulation:
                found = _checked(job, state["params"], start)
                if hosts.is_main:
                    print(found, file=sys.stderr, flush=True)
            compiled = update.compile()
            traced = compiled
            if not window.is_over(start + 1):
                traced = _to_trace(update, compiled, job, window)
                save_program(folder.profile, traced, job.mesh)
            prediction = _prediction(job, compiled)
            sinks = _sinks(config, job, folder, start) if hosts.is_main else []
            if hosts.is_main and prediction is not None:
                sinks.append(_first_steps(prediction, config, job, folder, hosts, start))
            rounds = None
            if axes := exchange_axes(job.plan):
                rounds = RoundsWatch(axes, lambda words: _say(hosts, words))
                sinks.append(rounds)
            collector = Collector(
                sinks,
                tokens_per_step=job.tokens_per_step,
                stop_on_nan=job.step.guarded,
            )
            stack.callback(collector.close)
            loop = TrainingLoop(
                config=config,
                job=job,
                update=compiled,
                traced=traced,
                checkpoints=checkpoints,
                collector=collector,
                window=window,
                stop=stop,
                watchdog=watchdog,
                say=lambda words: _say(hosts, words),
                rounds=rounds,
            )
            state, step = loop.run(state, start)
            with watchdog.paused():
                checkpoints.wait()
            window.close()
            if hosts.is_main and prediction is not None and window.captured:
                _tell_by_item(prediction, folder, hosts)
    model = (state["params"], state["state"]) if job.model.has_state else state["params"]
    conclude(config, job, model, step=step, last=collector.last, reason=stop.reason, say=hosts.is_main)
    return 0


def _window(config: Config, folder: RunFolder, hosts: Hosts) -> ProfileWindow:
    """Return the window that `config` asks for; none where a process of this run has died in it."""
    profile = config.profile
    start = profile.start_step
    died = None
    if start is not None:
        if start > config.train.steps:
            _say(
                hosts,
                f"no profile: profile.start_step={start} is past train.steps={config.train.steps}",
            )
        died = died_in(folder.profile, (start, profile.num_steps))
        # The first process's word is for all: they open and close the window at the same steps.
        if not from_first(int(died is None)):
            start = None
            _say(hosts, f"no profile is captured: a process died in or after its window before ({died})")
            _say(hosts, "training goes on without; remove that file to capture it all the same")
    return ProfileWindow(
        start_step=start,
        num_steps=profile.num_steps,
        directory=folder.profile,
        say=lambda words: _say(hosts, words),
    )


def _to_trace(update: Lowered, compiled: Compiled, job: Job, window: ProfileWindow) -> Compiled:
    """Return the step compiled so that a trace tells its operations apart; kernels are the same.

    What was tuned for the first compilation is tuned for this one: XLA keeps it by fusion, in the process and
    beside the compilation cache.
    """
    import jax

    options = options_to_trace(job.topology)
    if not options:
        return compiled
    try:
        return update.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        window.give_up(f"the step cannot be compiled for it: {one_line(error)}")
        return compiled


def _prediction(job: Job, compiled: Compiled) -> Prediction | None:
    """Return what was predicted of a step, where it was predicted of devices like those that are here."""
    estimate, chip = job.plan.estimate, job.topology.chip
    if estimate is None or chip.nominal or job.plan.topology.chip.name != chip.name:
        return None
    proof, sizes = job.plan.proof, compiled.memory_analysis()
    # An executable that comes from a cache does not know its sizes on GPUs, and says 0.
    held = 0 if sizes is None else peak_of(sizes, job.topology)
    return Prediction(
        estimate=estimate,
        compiled=StepCost(
            seconds=None if proof is None else proof.step_seconds,
            bytes=held or None,
            mfu=None if proof is None else _mfu(job, proof.step_seconds),
        ),
        where=str(job.topology),
    )


def _first_steps(
    prediction: Prediction, config: Config, job: Job, folder: RunFolder, hosts: Hosts, start: int
) -> FirstSteps:
    import jax

    def cost(step_seconds: float) -> StepCost:
        held = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
        most = max((size for size in held if size is not None), default=None)
        return StepCost(seconds=step_seconds, bytes=most, mfu=_mfu(job, step_seconds))

    profile = config.profile
    first = profile.start_step
    # The step before a window loads its executable, and the one after it waits for its trace to be written.
    traced = () if first is None else range(first - 1, first + profile.num_steps + 1)
    return FirstSteps(
        prediction,
        start=start,
        traced=traced,
        cost=cost,
        say=lambda words: _say(hosts, words),
        file=folder.prediction,
    )


def _mfu(job: Job, step_seconds: float) -> float | None:
    return job.flops_per_step / step_seconds / job.peak_flops if job.peak_flops else None


def _tell_by_item(prediction: Prediction, folder: RunFolder, hosts: Hosts) -> None:
    """Say a window's items beside the estimate's; a trace that cannot be read is said, and nothing more."""
    try:
        profile = profile_run(folder.path)
    except UserError as error:
        _say(hosts, f"note: {error}")
        return
    for line in prediction.by_item(profile) if profile.steps else ():
        _say(hosts, line)


def _say(hosts: Hosts, words: str) -> None:
    if hosts.is_main:
        print(words, file=sys.stderr, flush=True)


def _checked(job: Job, params: Any, start: int) -> AccumulationCheck:
    """Return what two parts of the first batch's rows give against the whole."""
    with job.data.iterate(start, job.step.batch["tokens"], stop_step=start + 1) as batches:
        batch = next(batches)
    try:
        return job.plan.check_accumulation(job.loss, params, batch, mesh=job.mesh)
    except UserError as error:
        raise UserError(f"{error}; train.check_accumulation=false trains all the same") from None


def _check_same_data(metadata: Any, job: Job) -> None:
    """Refuse to go on with other text: the batches to come would not be those of the run that was stopped."""
    before = metadata.get("data", {}).get("fingerprint")
    if before != job.data.fingerprint:
        raise UserError(
            f"the text of data.source={job.data.config.source!r} is not what this run was started on "
            f"(fingerprint {before}, now {job.data.fingerprint}); restore it, or give this run its own folder"
        )


def _announce(config: Config, job: Job, hosts: Hosts, start: int) -> None:
    mesh = " x ".join(f"{axis}={size}" for axis, size in job.plan.mesh.items())
    rest = f"; going on from step {start}" if start else ""
    print(
        f"{config.name}: {job.model.num_parameters:,} parameters on {job.topology} as {mesh}, "
        f"{job.plan.bytes_per_device() / 2**20:.1f} MiB of them on each device; "
        f"{job.tokens_per_step:,} tokens a step; {hosts}{rest}",
        file=sys.stderr,
        flush=True,
    )
    for note in job.plan.notes:
        print(f"note: {note}", file=sys.stderr)


def _sinks(config: Config, job: Job, folder: RunFolder, start: int) -> list[Sink]:
    sinks: list[Sink] = [
        JsonLines(folder.metrics, start),
        console(
            config.metrics.console,
            steps=config.train.steps,
            start_step=start,
            every=config.metrics.console_every,
            peak_flops=job.peak_flops,
            step_flops=job.flops_per_step,
        ),
    ]
    if config.metrics.tensorboard:
        sinks.append(TensorBoard(folder.tensorboard))
    return sinks
