"""Memory that a program may have: JAX's share by default, the environment's where that says another."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.sharding import Plan, Topology, UserError, plan
from meshwright.sharding.hardware import attached
from meshwright.sharding.hardware.memory import ALLOCATOR, FRACTIONS, PREALLOCATE, notes_on, usable_bytes
from meshwright.sharding.xla.options import Trial

NEW, OLD = FRACTIONS
_FACTOR = "xla_gpu_memory_limit_slop_factor"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """A machine of its own, with no GPU yet and nothing said in the environment."""
    for name in (*FRACTIONS, PREALLOCATE, ALLOCATOR):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(attached, "_ROOT", tmp_path)
    return tmp_path


def put_gpu(machine: pathlib.Path, model: str) -> None:
    folder = machine / "proc/driver/nvidia/gpus/0000:19:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 16\n")


def share(name: str) -> float:
    chip = Topology.parse(name).chip
    assert chip.hbm_bytes is not None
    return usable_bytes(chip) / chip.hbm_bytes


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ({}, 0.75),
        ({NEW: "0.9"}, 0.9),
        ({OLD: ".5"}, 0.5),
        ({PREALLOCATE: "false"}, 0.75),
        ({PREALLOCATE: "false", OLD: "0.9"}, 0.9),
        ({ALLOCATOR: "platform"}, 1.0),
        ({ALLOCATOR: "platform", OLD: "0.5"}, 1.0),
        ({ALLOCATOR: "cuda_async", NEW: "0.8"}, 0.8),
    ],
)
def test_attached_gpus_have_what_the_environment_says(
    machine: pathlib.Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, str], wanted: float
) -> None:
    put_gpu(machine, "NVIDIA H200")
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    assert share("h200:8") == pytest.approx(wanted)
    # The environment of this machine says nothing of other devices.
    assert share("h100:8") == pytest.approx(0.75)
    assert share("v5p:2x2x1") == 1.0


def test_without_a_gpu_the_environment_is_of_those_that_are_described(
    machine: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = Topology.parse("h200:8").chip
    assert notes_on(chip) == ()
    monkeypatch.setenv(OLD, "0.5")
    assert share("h200:8") == pytest.approx(0.5)
    assert share("v5p:2x2x1") == 1.0
    assert notes_on(Topology.parse("v5p:2x2x1").chip) == ()
    (said,) = notes_on(chip)
    assert said.startswith(
        f"the plan counts on 70.2 GiB of each h200's 140.4 GiB, by {OLD}=0.5 of this process"
    )
    (machine / "dev").mkdir()
    (machine / "dev/nvidia0").touch()
    assert notes_on(chip) == ()
    # A container may show a GPU and not its kind.
    assert share("h200:8") == pytest.approx(0.5)


def test_beside_gpus_of_another_kind_it_is_theirs(
    machine: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_gpu(machine, "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv(OLD, "0.5")
    assert share("h200:8") == pytest.approx(0.75)
    (said,) = notes_on(Topology.parse("h200:8").chip)
    assert said.startswith(f"{OLD}=0.5 is of this process, whose machine has no h200")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({OLD: "most"}, f"{OLD}=most is no share of a device's memory; nearest: 0.75"),
        ({NEW: "1.2"}, f"{NEW}=1.2 is no share"),
        ({NEW: "0"}, f"{NEW}=0 is no share"),
        ({NEW: "0.5", OLD: "0.5"}, "are both set, which JAX refuses"),
    ],
)
def test_what_jax_would_refuse_is_refused(
    machine: pathlib.Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, str], said: str
) -> None:
    put_gpu(machine, "NVIDIA H100 80GB HBM3")
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        share("h100:8")


def test_a_plan_fits_into_what_is_left_of_the_device(
    machine: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_gpu(machine, "NVIDIA H100 80GB HBM3")

    def loss(params: jax.Array, batch: jax.Array) -> jax.Array:
        return ((batch @ params) ** 2).mean()

    shape = jax.ShapeDtypeStruct
    words = (loss, shape((65536, 32768), "float32"), shape((8, 65536), "float32"))
    assert plan(*words, topology="h100:1").estimate is not None
    monkeypatch.setenv(OLD, "0.2")
    with pytest.raises(UserError, match="fit"):
        plan(*words, topology="h100:1")


def layers(params: jax.Array, batch: jax.Array) -> jax.Array:
    def layer(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, None]:
        return jnp.sin(x @ weights), None

    return (jax.lax.scan(layer, batch, params)[0] ** 2).mean()


def of_one_row(tokens: int) -> Plan:
    """A plan for one H100 of layers over one row, which no microbatches can cut."""
    shape = jax.ShapeDtypeStruct
    words = (shape((16, 8192, 8192), "bfloat16"), shape((1, tokens, 8192), "bfloat16"))
    return plan(layers, *words, topology="h100:1", optimizer=optax.adamw(1e-3))


def test_a_plan_says_what_the_rest_of_the_memory_would_win(
    machine: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(made: Plan) -> list[str]:
        return [note for note in made.notes if NEW in note]

    assert not told(of_one_row(65536))
    # So many tokens have to be run again within three quarters of the memory.
    usual = of_one_row(92000)
    assert usual.compiler_options == {}
    (said,) = told(usual)
    assert said.startswith(f"JAX reserves 59.7 GiB of a GPU's 79.6 GiB; with {NEW}=0.9 ")
    monkeypatch.setenv(NEW, "0.9")
    more = of_one_row(92000)
    assert not told(more)
    assert usual.estimate is not None
    assert more.estimate is not None
    assert f"{more.estimate.step_seconds * 1e3:.0f} ms a step instead of" in said
    assert usual.estimate.step_seconds > 1.2 * more.estimate.step_seconds
    # (0.9 x 85.5 - 8.0) / (0.8 x 85.5 - 8.0) GB: 2.1 of parameters, 4.3 of moments and a batch of 1.5.
    assert more.compiler_options == {_FACTOR: 115}


@pytest.mark.slow
@pytest.mark.numerics(False)
def test_the_compiler_uses_what_jax_reserves(machine: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself it schedules within three quarters of a GPU, and runs again what would not fit there."""
    monkeypatch.setenv(NEW, "0.9")
    made = of_one_row(98000)

    def reruns(plan: Plan) -> bool:
        proof = plan.verify().proof
        assert proof is not None
        assert 0.76 < proof.peak_bytes / 85.5e9 < 0.9
        return any(finding.kind == "compiler_rematerialised" for finding in proof.findings)

    assert not reruns(made)
    assert reruns(dataclasses.replace(made, compiler_options={}))
    # It is no reason to try no others, wherever the plan came from.
    monkeypatch.delenv(NEW)
    harmless = Trial(name="harmless", options={"xla_gpu_enable_triton_gemm": True}, ran=True)
    monkeypatch.setattr("meshwright.sharding.xla.options.trials_for", lambda topology: [harmless])
    smaller = dataclasses.replace(of_one_row(65536), compiler_options={_FACTOR: 115})
    proved = smaller.verify(top=2)
    assert any(note.startswith("compiler options harmless") for note in proved.notes)
    assert proved.compiler_options[_FACTOR] == 115
