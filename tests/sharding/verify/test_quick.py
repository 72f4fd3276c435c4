"""Quick proofs: what a TPU's compiler scheduled, before it makes machine code, is what it compiles to."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.sharding import Plan, plan
from meshwright.sharding.plans.proof import Proof
from meshwright.sharding.report.plan import plan_document
from meshwright.sharding.report.terminal import Printed
from rich.console import Console

WIDTH, ROWS = 1024, 4096


def loss(params: Any, batch: Any) -> Any:
    hidden = jax.nn.relu(batch["x"] @ params["up"])
    return jnp.mean((hidden @ params["down"] - batch["y"]) ** 2)


def planned(topology: str, **mesh: int) -> Plan:
    shape = jax.ShapeDtypeStruct
    params = {"up": shape((WIDTH, 4 * WIDTH), "float32"), "down": shape((4 * WIDTH, WIDTH), "float32")}
    batch = {name: shape((ROWS, WIDTH), "float32") for name in ("x", "y")}
    return plan(loss, params, batch, topology=topology, optimizer=optax.adamw(1e-3), mesh=mesh)


def proof_of(made: Plan) -> Proof:
    assert made.proof is not None
    return made.proof


def lines(proof: Proof) -> set[int]:
    return {row.source.line for row in proof.lines if row.source.function == "loss"}


def collectives(proof: Proof) -> set[tuple[str, tuple[str, ...], float]]:
    return {(row.kind, row.axes, row.count) for row in proof.collectives}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.numerics(False)
def test_it_has_the_memory_and_the_collectives_of_the_whole_program(tmp_path: pathlib.Path) -> None:
    made = planned("v5p:4x4x4", fsdp=16, tensor=4)
    quick = made.verify(quick=True)
    found = proof_of(quick)
    assert found.quick
    assert not found.cached
    # A whole one is asked for: a quick one does not answer.
    whole = proof_of(made.verify())
    assert not whole.quick
    assert not whole.cached
    assert found.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-3)
    assert found.memory["arguments"] == pytest.approx(whole.memory["arguments"], rel=1e-3)
    assert collectives(found) == collectives(whole)
    assert "reduce_scatter" in {row.kind for row in found.collectives}
    assert found.flops == whole.flops
    assert lines(found) == lines(whole)
    # A quick one is asked for, and the whole one is known by now.
    again = proof_of(made.verify(quick=True))
    assert again.cached
    assert not again.quick

    quick.save(tmp_path / "quick.plan.json")
    assert proof_of(Plan.load(tmp_path / "quick.plan.json")).quick
    console = Console(width=200)
    with console.capture() as said:
        console.print(Printed(plan_document(quick)))
    assert "step, scheduled" in said.get()
    assert "scheduled by libtpu" in said.get()
    assert "without machine code" in said.get()


WORKS_ON = """
import os, pathlib, sys, threading
from meshwright.sharding.verify.scheduled import scheduled_or_compiled

folder = pathlib.Path(sys.argv[1])

class Lowered:
    def compile(self, compiler_options):
        (folder / "step-TLP-hlo.txt").write_text("HloModule step {}")
        threading.Event().wait()

text = scheduled_or_compiled(Lowered(), None, folder)
nice = {thread.native_id == threading.get_native_id(): os.getpriority(os.PRIO_PROCESS, thread.native_id)
        for thread in threading.enumerate()}
print(text, nice[True], nice[False], flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have no niceness of their own")
def test_a_compiler_that_works_on_is_given_a_core_last(tmp_path: pathlib.Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", WORKS_ON, tmp_path], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout.split() == ["HloModule", "step", "{}", str(os.nice(0)), "19"]


@pytest.mark.slow
@pytest.mark.numerics(False)
def test_gathers_along_a_part_of_an_axis_and_others_take_what_they_do_in_the_whole_program() -> None:
    """Of the torus, `fsdp` has half of one axis and all of two: the compiler makes one ring of it."""
    made = planned("v5p:4x4x4", fsdp=32, tensor=2)
    quick, whole = (
        {
            row.kind: row.seconds
            for row in proof_of(made.verify(quick=one)).collectives
            if row.axes == ("fsdp",)
        }
        for one in (True, False)
    )
    assert quick["all_gather"] == pytest.approx(whole["all_gather"], rel=1e-3)


def test_another_compiler_makes_the_whole_program_and_the_plan_says_so() -> None:
    made = planned("cpu:8", fsdp=8).verify(quick=True)
    assert not proof_of(made).quick
    assert any("compiled whole: only compilers for TPUs" in note for note in made.notes)
