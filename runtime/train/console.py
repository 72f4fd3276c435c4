"""The progress of a run in a terminal: one bar, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from .metrics import Sink


def console(
    kind: str, *, steps: int, start_step: int, every: int, peak_flops: float | None, step_flops: float
) -> Sink:
    """Return the sink that `metrics.console` asks for.

    `peak_flops` is what all devices together can do a second, None where the chip is not known;
    `step_flops` is what a step needs, so their ratio over time is the model FLOPs utilisation (MFU).
    """
    if kind == "auto":
        kind = "bar" if sys.stderr.isatty() else "lines"
    describe = _Describe(steps=steps, start_step=start_step, peak_flops=peak_flops, step_flops=step_flops)
    if kind == "bar":
        return _Bar(describe, steps, start_step)
    return _Lines(describe, steps, start_step, every if kind == "lines" else 0)


class _Describe:
    """Turns records into words; keeps a running mean of the step time, first (compiling) step left out."""

    def __init__(self, *, steps: int, start_step: int, peak_flops: float | None, step_flops: float) -> None:
        self.steps = steps
        self.first = start_step + 1
        self.peak_flops = peak_flops
        self.step_flops = step_flops
        self.mean_seconds: float | None = None
        self.began = time.monotonic()

    def words(self, record: Mapping[str, Any]) -> str:
        seconds = record["step_seconds"]
        if record["step"] > self.first:
            self.mean_seconds = (
                seconds if self.mean_seconds is None else 0.9 * self.mean_seconds + 0.1 * seconds
            )
        mean = self.mean_seconds or seconds
        rate = record["tokens_per_second"] * seconds / mean
        parts = [f"loss {record['loss']:.4f}", f"{rate:,.0f} tokens/s"]
        if self.peak_flops:
            parts.append(f"MFU {self.step_flops / mean / self.peak_flops:.1%}")
        if "eval_loss" in record:
            parts.append(f"held-out loss {record['eval_loss']:.4f}")
        left = (self.steps - record["step"]) * mean
        parts.append(f"ETA {_clock(left)}" if left else f"took {_clock(time.monotonic() - self.began)}")
        return "  ".join(parts)


class _Lines:
    def __init__(self, describe: _Describe, steps: int, start_step: int, every: int) -> None:
        self._describe, self._every = describe, every
        self._always = (start_step + 1, steps)

    def write(self, record: Mapping[str, Any]) -> None:
        words = self._describe.words(record)
        step = record["step"]
        if self._every and (step % self._every == 0 or step in self._always or "eval_loss" in record):
            print(f"step {step}/{self._describe.steps}  {words}", file=sys.stderr, flush=True)

    def close(self) -> None: ...


class _Bar:
    def __init__(self, describe: _Describe, steps: int, start_step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._describe = describe
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[words]}"),
            console=Console(stderr=True),
            refresh_per_second=4,
        )
        self._progress.start()
        self._task = self._progress.add_task("", total=steps, completed=start_step, words="compiling")

    def write(self, record: Mapping[str, Any]) -> None:
        words = self._describe.words(record)
        self._progress.update(self._task, completed=record["step"], words=words)
        if "eval_loss" in record:
            self._progress.console.print(
                f"step {record['step']}  held-out loss {record['eval_loss']:.4f}", highlight=False
            )

    def close(self) -> None:
        self._progress.stop()


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
