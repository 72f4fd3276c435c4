"""A trace refines a record: operations as long as another record says give that one's efficiencies back."""

from __future__ import annotations

import dataclasses

import pytest
from meshwright.runtime.calibrate import traced
from meshwright.runtime.calibrate.traced import TracedKind, compared
from meshwright.runtime.cli.main import app
from meshwright.runtime.profiling.profile import Operation
from meshwright.sharding import Topology
from meshwright.sharding.compiled.roofline import instruction_cost
from meshwright.sharding.cost.calibration import calibration_for
from meshwright.sharding.cost.measured import Measurement, load, save
from meshwright.sharding.hlo.text import parse_hlo
from typer.testing import CliRunner

CHIP = Topology.parse("h200:1").chip
PROGRAM = parse_hlo(
    """HloModule jit_step, is_scheduled=true

ENTRY %main (a: bf16[8192,4096], b: bf16[4096,8192], c: f32[8192,8192]) -> f32[8192,8192] {
  %a = bf16[8192,4096]{1,0} parameter(0)
  %b = bf16[4096,8192]{1,0} parameter(1)
  %c = f32[8192,8192]{1,0} parameter(2)
  %dot.1 = f32[8192,8192]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %add.2 = f32[8192,8192]{1,0} add(%dot.1, %c)
  ROOT %multiply.3 = f32[8192,8192]{1,0} multiply(%add.2, %add.2)
}
"""
)


def operation(name: str, seconds: float, count: float = 1.0) -> Operation:
    return Operation(
        name=name, kind="compute", opcode="", source=None, op_name="", count=count, seconds=seconds, share=0.1
    )


def test_operations_tell_the_efficiencies_by_which_they_took_so_long() -> None:
    shipped = calibration_for("h200", "cudnn")
    true = dataclasses.replace(shipped, matmul_efficiency=0.5, memory_efficiency=0.7)
    ran = [
        operation(
            name, 2.0 * instruction_cost(PROGRAM, PROGRAM.instructions[name], CHIP, true, {}).seconds, 2.0
        )
        for name in ("dot.1", "add.2", "multiply.3")
    ]
    elsewhere = [operation("jit_other/fusion.9", 1.0), operation("__amd_rocclr_copyBuffer.kd", 1.0)]
    found = {one.field: one.after for one in compared([*ran, *elsewhere], PROGRAM, CHIP, shipped)}
    assert found == pytest.approx({"matmul_efficiency": 0.5, "memory_efficiency": 0.7}, rel=1e-3)


def test_a_run_without_a_profile_is_told(tmp_path) -> None:
    done = CliRunner().invoke(app, ["profile", str(tmp_path), "--calibrate"])
    assert done.exit_code
    assert "has captured no profile" in str(done.exception)


def test_without_a_file_the_caches_own_is_refined_and_its_folder_made(tmp_path, monkeypatch) -> None:
    """There is none at first, then one of `meshwright calibrate`, whose name says more than a trace."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, seen = tmp_path / "cache" / "meshwright" / "calibrations", []
    kind = TracedKind(field="memory_efficiency", traced=2.0, recorded=1.0, before=0.8)

    def refined(run, known):
        seen.append(known("h200", "0.11.2"))
        base = seen[-1] or Measurement(chip="h200", jax="0.11.2")
        efficiencies = {**base.efficiencies, kind.field: kind.after}
        return dataclasses.replace(base, efficiencies=efficiencies), [kind]

    monkeypatch.setattr(traced, "refined", refined)
    first = CliRunner().invoke(app, ["profile", str(tmp_path), "--calibrate"])
    assert not first.exit_code, first.exception
    assert [path.name for path in folder.iterdir()] == ["h200-jax-0.11.2.json"]
    (folder / "h200-jax-0.11.2.json").unlink()

    whole = Measurement(
        chip="h200", jax="0.11.2", driver="560", cudnn="91", efficiencies={"matmul_efficiency": 0.6}
    )
    save(whole, folder / "h200-jax-0.11.2-560-91.json")
    save(dataclasses.replace(whole, jax="0.11.20"), folder / "h200-jax-0.11.20-560-91.json")
    again = CliRunner().invoke(app, ["profile", str(tmp_path), "--calibrate"])
    assert not again.exit_code, again.exception
    assert seen[0] is None
    assert seen[1].efficiencies == whole.efficiencies
    kept = load(folder / "h200-jax-0.11.2-560-91.json")
    assert kept.efficiencies == {"matmul_efficiency": 0.6, "memory_efficiency": 0.4}
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["profile", ".", "--out", "a.json"], "--out a.json is where --calibrate writes; add --calibrate"),
        (["profile", ".", "--calibrate", "--json"], "leave --json out"),
        (["calibrate", "--out", "nowhere/a.json"], "there is no folder nowhere"),
    ],
)
def test_what_would_be_ignored_or_found_late_is_told(words, says) -> None:
    assert says in str(CliRunner().invoke(app, words).exception)
