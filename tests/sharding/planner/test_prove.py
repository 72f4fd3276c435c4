"""The compiler's word decides: what does not fit makes way, and of several plans the fastest stays."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.sharding import Plan, UserError, plan
from meshwright.sharding.hardware.topology import Topology
from meshwright.sharding.verify.verify import Verdict, verify
from meshwright.sharding.xla.options import Trial, trials_for

ROWS, NARROW, WIDTH, BRANCHES, LAYERS = 2**21, 64, 2048, 32, 8
SMALL = 256  # Of products that a compiler is quick about.


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A cache in which the compiler answers each question of this file once."""
    return tmp_path_factory.mktemp("answers")


@pytest.fixture(autouse=True)
def one_cache(own_cache: None, answers: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(answers))


def layers_plan(topology: str) -> Plan:
    """Products alone."""

    def loss(params: Any, batch: Any) -> Any:
        def layer(x: Any, weight: Any) -> tuple[Any, None]:
            return jnp.tanh(x @ weight), None

        return jax.lax.scan(layer, batch["x"], params["layers"])[0].astype(jnp.float32).mean()

    params = {"layers": jax.ShapeDtypeStruct((LAYERS, SMALL, SMALL), jnp.bfloat16)}
    batch = {"x": jax.ShapeDtypeStruct((2**16, SMALL), jnp.bfloat16)}
    return plan(loss, params, batch, topology=topology, optimizer=optax.adamw(1e-3))


def wide_plan(**declared: Any) -> Plan:
    """A loss all of whose branches are alive at once, while the Estimate counts the largest of them."""

    def loss(params: Any, batch: Any) -> Any:
        @jax.checkpoint
        def branches(x: Any) -> Any:
            found = jax.lax.optimization_barrier([jnp.sin(x @ weight) for weight in params["branches"]])
            return sum(a * b for a, b in zip(found, reversed(found), strict=True))

        def layer(x: Any, weight: Any) -> tuple[Any, None]:
            return jnp.tanh(x @ weight), None

        return jax.lax.scan(layer, branches(batch["x"]), params["layers"])[0].astype(jnp.float32).mean()

    params = {
        "branches": [jax.ShapeDtypeStruct((NARROW, WIDTH), jnp.bfloat16)] * BRANCHES,
        "layers": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16),
    }
    batch = {"x": jax.ShapeDtypeStruct((ROWS, NARROW), jnp.bfloat16)}
    return plan(
        loss,
        params,
        batch,
        topology="h100:1x8",
        optimizer=optax.sgd(1e-3),
        mesh={"data": 8},
        remat="none",
        **declared,
    )


def test_a_plan_that_does_not_fit_makes_way() -> None:
    first = wide_plan()
    proved = first.verify()
    assert proved.proof is not None
    assert proved.microbatches > first.microbatches
    assert any("compiled and not taken" in note and "too much" in note for note in proved.notes)


def test_what_is_declared_does_not_make_way() -> None:
    with pytest.raises(UserError, match=r"nothing that was compiled for h100:8 fits: .*too much"):
        wide_plan(microbatches=1).verify()


@pytest.mark.slow
def test_of_several_the_fastest_as_compiled_is_kept() -> None:
    made = layers_plan("h100:2x8")
    proved = made.verify(top=3)
    assert proved.proof is not None
    told = [row.lost for row in proved.alternatives if row.lost.startswith("compiled, it takes")]
    assert len(told) == 2
    assert all(re.search(r", (\d+\.\d% longer|as long), in \d", lost) for lost in told)


@pytest.mark.slow
def test_options_are_tried_with_several_and_kept_where_they_help() -> None:
    made = layers_plan("h100:2x8")
    assert not any("options" in note for note in made.verify().notes)
    proved = made.verify(top=2)
    assert proved.proof is not None
    kept: dict[str, Any] = {}
    told = [note for note in proved.notes if note.startswith("compiler options")]
    for trial, note in zip(trials_for(Topology.parse("h100:2x8")), told, strict=True):
        assert note.startswith(f"compiler options {trial.name}")
        took, without = (float(found) for found in re.findall(r"([\d.]+) ", note)[:2])
        kept |= trial.options if took < without else {}
    assert proved.compiler_options == kept


@pytest.mark.slow
def test_what_helps_is_kept_when_the_next_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real compiles, whose seconds are made to depend on the options alone."""
    harmful, helpful, further = (
        Trial(name=f"set {n}", options={option: True}, ran=True)
        for n, option in enumerate(
            (
                "xla_gpu_enable_triton_gemm",
                "xla_gpu_enable_while_loop_double_buffering",
                "xla_gpu_enable_latency_hiding_scheduler",
            )
        )
    )
    took = {
        frozenset(): 4.0,
        frozenset(helpful.options): 3.0,
        frozenset(helpful.options) | set(further.options): 2.0,
    }

    def timed(made: Plan, *program: Any, **others: Any) -> Verdict:
        verdict = verify(made, *program, **others)
        assert verdict.proof is not None
        seconds = took.get(frozenset(made.compiler_options), 5.0)
        return dataclasses.replace(verdict, proof=dataclasses.replace(verdict.proof, step_seconds=seconds))

    monkeypatch.setattr("meshwright.sharding.verify.verify.verify", timed)
    monkeypatch.setattr(
        "meshwright.sharding.xla.options.trials_for", lambda topology: [harmful, helpful, further]
    )
    proved = layers_plan("h100:2x8").verify(top=2)
    assert proved.compiler_options == {**helpful.options, **further.options}
    assert proved.proof is not None
    assert proved.proof.step_seconds == 2.0
    told = [note for note in proved.notes if note.startswith("compiler options")]
    assert [re.findall(r"([\d.]+) s", note) for note in told] == [
        ["5", "4"],
        ["3", "4"],
        ["2", "3"],
    ]


@pytest.mark.slow
def test_declared_options_are_left_alone() -> None:
    """By whatever plan is chosen, with no others tried."""
    options = {"xla_gpu_enable_triton_gemm": True}
    proved = dataclasses.replace(layers_plan("h100:2x8"), compiler_options=options).verify(top=2)
    assert proved.compiler_options == options
    assert not any("compiler options" in note for note in proved.notes)
    too_large = dataclasses.replace(wide_plan(), compiler_options=options).verify()
    assert too_large.microbatches > 1
    assert too_large.compiler_options == options


@pytest.mark.slow
@pytest.mark.numerics(False)
def test_of_several_for_tpus_only_those_that_may_be_the_fastest_are_compiled_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real compiles, whose seconds are made to depend on the layout, the options and how far they went."""
    seen: list[Any] = []
    asked: list[tuple[int, int, bool]] = []
    # As scheduled and as compiled, of the three layouts in the order in which they are asked for.
    took = [(3.0, None), (2.0, 2.3), (2.1, 2.2)]

    def timed(made: Plan, *program: Any, quick: bool, **others: Any) -> Verdict:
        verdict = verify(made, *program, quick=quick, **others)
        assert verdict.proof is not None
        assert verdict.proof.quick == quick
        layout = (dict(made.mesh), made.remat, dict(made.saved), made.microbatches)
        if layout not in seen:
            seen.append(layout)
        place = seen.index(layout)
        asked.append((place, len(made.compiler_options), quick))
        seconds = took[place][0 if quick else 1]
        assert seconds is not None
        seconds -= 0.01 * len(made.compiler_options)
        return dataclasses.replace(verdict, proof=dataclasses.replace(verdict.proof, step_seconds=seconds))

    monkeypatch.setattr("meshwright.sharding.verify.verify.verify", timed)
    first, second = (len(trial.options) for trial in trials_for(Topology.parse("v5e:2x4")))
    in_order = [
        (0, 0, True),
        (1, 0, True),
        (2, 0, True),
        (1, 0, False),
        (2, 0, False),
        (2, first, True),
        (2, first + second, True),
        (2, first + second, False),
    ]
    layers_plan("v5e:2x4").verify(top=3)
    assert asked == in_order
    # Again all are compared as scheduled, though some are known as compiled.
    asked.clear()
    proved = layers_plan("v5e:2x4").verify(top=3)
    assert asked == in_order
    assert proved.proof is not None
    assert not proved.proof.quick
    assert len(proved.compiler_options) == first + second
    told = " ".join((*(row.lost for row in proved.alternatives), *proved.notes))
    assert "scheduled only, it takes 3 s, 42.9% longer than this one as scheduled, in" in told
    assert "compiled, it takes 2.3 s, 4.5% longer, in" in told
    said = [note for note in proved.notes if note.startswith("compiler options")]
    assert [re.findall(r"([\d.]+ s)(?: (scheduled|compiled))?", note) for note in said] == [
        [("2.05 s", "scheduled"), ("2.1 s", "")],
        [("2.04 s", "scheduled"), ("2.05 s", "")],
        [("2.14 s", "compiled"), ("2.2 s", "")],
    ]
