"""Planes of a trace made by hand, as `jax.profiler.ProfileData` gives them."""

from types import SimpleNamespace


def event(name, start, end, **stats):
    """Return an event from `start` to `end` nanoseconds."""
    return SimpleNamespace(name=name, start_ns=start, duration_ns=end - start, stats=list(stats.items()))


def plane(name, lines=()):
    """Return a plane of (name, events) pairs, two of which may have one name."""
    made = [SimpleNamespace(name=line, events=events) for line, events in lines]
    return SimpleNamespace(name=name, lines=made)


class Gpu:
    """Builds the planes of a GPU program's trace: what the host launched, and what streams ran of it."""

    def __init__(self, devices=1):
        self.streams = {number: {} for number in range(devices)}
        self.host = {}
        self.next_id = 1

    def execution(self, at, ops, *, device=0, module="jit_step", program="1", thread="python", ordinal=None):
        """Launch `ops`, (stream, operation, start, end), from `at` on, one a nanosecond; return their ids."""
        prefix = f"[{ordinal}] " if ordinal is not None else ""
        mark = event(f"{prefix}GpuExecutable::ExecuteThunks", at, at + len(ops) + 1, module_name=module)
        self.host.setdefault(thread, []).append(mark)
        ids = []
        for k, (stream, op, start, end) in enumerate(ops):
            ids.append(self.kernel(device, stream, op, start, end, module=module, program=program))
            self.launch(ids[-1], at + 1 + k, thread=f"Host Threads/{thread}")
        return ids

    def kernel(
        self, device, stream, op, start, end, *, kernel=None, correlation=None, module="", program="1"
    ):
        """Put a kernel on a stream; without a module it has no statistics of a program."""
        if correlation is None:
            correlation = self.next_id
            self.next_id += 1
        named = {"hlo_op": op, "hlo_module": module, "program_id": program} if module else {}
        made = event(kernel or f"{op.replace('.', '_')}", start, end, correlation_id=correlation, **named)
        self.streams[device].setdefault(stream, []).append(made)
        return correlation

    def launch(self, correlation, at, *, name="cuLaunchKernelEx", thread="Host Threads/1"):
        """Say when a kernel was launched."""
        self.host.setdefault(thread, []).append(event(name, at, at + 1, correlation_id=correlation))

    def step(self, number, start, end):
        """Number a step of the host's loop."""
        self.host.setdefault("loop", []).append(event("train_step", start, end, step_num=number))

    def planes(self):
        """Return all of it."""
        devices = [plane(f"/device:GPU:{n}", streams.items()) for n, streams in self.streams.items()]
        return [plane("/host:CPU", self.host.items()), *devices]
