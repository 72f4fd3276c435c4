"""What the doctor finds on this machine, healthy and with something made wrong."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import pathlib

import pytest
from meshwright.runtime.doctor import Check, examine, render
from meshwright.runtime.doctor.variables import memory
from meshwright.runtime.doctor.versions import flax, versions
from rich.console import Console

VARIABLES = ("SLURM_", "OMPI_", "PMI_", "KUBERNETES_", "JAX_", "XLA_", "MESHWRIGHT_")


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    for name in [name for name in os.environ if name.startswith(VARIABLES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def found(findings: list[Check], name: str) -> Check:
    return next(finding for finding in findings if finding.name == name)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Make every new Python, and so the child that asks JAX, hang at its start."""
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_healthy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    monkeypatch.setenv("JAX_CHECK_TRACER_LEAKS", "0")
    monkeypatch.setenv("JAX_DISABLE_JITT", "1")
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    monkeypatch.setenv("JAX_DEBUG_NANS", "True")
    findings = examine()
    assert [finding.name for finding in findings if finding.status == "bad"] == []
    assert found(findings, "devices").value == "3 × cpu (cpu)"
    assert found(findings, "simulated devices").value.startswith("3")
    assert "compiled, 0 files" in found(findings, "compilation cache").value
    misspelt = found(findings, "JAX_DISABLE_JITT")
    assert (misspelt.status, misspelt.advice) == (
        "warn",
        "JAX has no such setting; did you mean 'JAX_DISABLE_JIT'?",
    )
    assert "every step is waited for" in found(findings, "JAX_DEBUG_NANS").advice
    named = {finding.name for finding in findings}
    assert not named & {"JAX_CHECK_TRACER_LEAKS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"}
    assert json.loads(json.dumps([finding.to_dict() for finding in findings]))[0]["name"] == "python"


@pytest.mark.parametrize(
    ("variable", "value", "reason", "advice"),
    [
        (
            "XLA_FLAGS",
            "--xla_no_such=1",
            "Unknown flag in XLA_FLAGS: --xla_no_such=1",
            "XLA_FLAGS names a flag",
        ),
        ("JAX_PLATFORMS", "warp", "'warp'", "JAX_PLATFORMS=warp asks for what is not here"),
    ],
)
def test_what_keeps_jax_from_starting(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str, advice: str
) -> None:
    monkeypatch.setenv(variable, value)
    devices = found(examine(), "devices")
    assert devices.status == "bad"
    assert reason in devices.value
    assert advice in devices.advice


@pytest.mark.usefixtures("stuck")
def test_a_device_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "7")
    findings = examine(timeout_seconds=0.3)
    assert found(findings, "devices").value == "JAX did not list its devices within 0.3 s"
    assert found(findings, "hosts").status == "bad"
    assert "do not number a process" in found(findings, "hosts").advice


@pytest.mark.usefixtures("stuck")
def test_versions_are_held_against_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    real = importlib.metadata.version
    pretended = {"jaxlib": "0.9.1", "jax-cuda13-plugin": "0.10.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: pretended.get(name) or real(name))
    findings = examine(timeout_seconds=0.1)
    assert found(findings, "jaxlib").advice.startswith("meshwright needs")
    assert found(findings, "jax and jaxlib").status == "bad"
    assert (
        found(findings, "GPU compiler").advice
        == 'it must match jaxlib 0.9.1: pip install "jax-cuda13-plugin==0.9.1"'
    )


@pytest.mark.usefixtures("stuck")
def test_compilers_are_held_against_what_jax_was_released_with(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    real = importlib.metadata.version

    def version(name: str) -> str:
        if name.startswith("jax-cuda"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.0.1" if name == "libtpu" else real(name)

    compilers = [finding.value for finding in examine(timeout_seconds=0.1) if "compiler" in finding.name]
    assert compilers == [f"libtpu {real('libtpu')}", f"jax-cuda13-plugin {real('jax-cuda13-plugin')}"]
    monkeypatch.setattr(importlib.metadata, "version", version)
    findings = examine(timeout_seconds=0.1)
    assert found(findings, "TPU compiler").status == "warn"
    assert found(findings, "TPU compiler").advice.startswith("JAX was released with 0.0.")
    assert found(findings, "GPU compiler").value == "not installed"
    assert found(findings, "GPU compiler").advice.startswith('pip install "meshwright[verify]" compiles')


def test_rendering_says_what_is_wrong() -> None:
    output = io.StringIO()
    findings = [
        Check(name="disk here", value="0.1 GiB free", status="bad", advice="checkpoints fill it"),
        Check(name="python", value="3.11"),
    ]
    Console(file=output, width=80).print(render(findings))
    lines = [line.strip() for line in output.getvalue().splitlines()]
    assert lines[1] == "→ checkpoints fill it"
    assert lines[-1] == "wrong: disk here"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ({}, "ok", "JAX may use 75% of each GPU's 140.4 GiB, 105.3 GiB; it says 104.9 GiB"),
        (
            {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"},
            "ok",
            "90% of each GPU's 140.4 GiB, 126.4 GiB; it says 104.9 GiB (XLA_PYTHON_CLIENT_MEM_FRACTION=0.9)",
        ),
        ({"XLA_CLIENT_MEM_FRACTION": "9"}, "bad", "XLA_CLIENT_MEM_FRACTION=9 is no share"),
    ],
)
def test_what_jax_reserves_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, words: dict[str, str], status: str, said: str
) -> None:
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    answer = {"platform": "gpu", "kinds": ["NVIDIA H200"], "bytes_limit": 112_637_198_336}
    (finding,) = memory(answer)
    assert finding.status == status
    assert said in finding.value + finding.advice
    assert not list(memory({"platform": "cpu", "kinds": ["cpu"]}))


def test_flax_that_does_not_load_beside_jax_is_named_with_both_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretended = {"flax": "0.12.8", "jax": "0.11.2"}
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: pretended.get(name) or real(name))
    (finding,) = flax({"flax_error": "AttributeError: no attribute 'HiPrimitive'"})
    assert (finding.status, finding.value) == ("bad", "flax 0.12.8, jax 0.11.2")
    assert finding.advice.startswith(
        "flax 0.12.8 does not load with jax 0.11.2 (AttributeError: no attribute"
    )
    assert finding.advice.endswith('HiPrimitive\'): pip install "flax>=0.12.10"')
    assert not list(flax({"flax_error": None}))


def test_requirements_of_another_python_are_not_held_against_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [
        "flax<0.1,>=0.0.1; python_version < '3.9'",
        'flax<1,>=0.12; python_version >= "3.9"',
        "numpy>=99; extra == 'test'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: lines)
    assert {name: found(list(versions()), name).status for name in ("flax", "numpy")} == {
        "flax": "ok",
        "numpy": "ok",
    }
