"""A faster plan of which only a compiler can say whether it fits: told of, compiled first, taken if so."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.runtime.config import load
from meshwright.runtime.train.planning import plan_config
from meshwright.sharding import Plan, plan
from meshwright.sharding.verify.verify import Verdict, verify

CONFIGS = pathlib.Path(__file__).parents[3] / "configs"
WIDTH, LAYERS = 1024, 8
# Rows whose kept values fit one v5e: surely, without the places that an allocator leaves free, not at all.
SURELY, NEARLY, NEVER = (thousand * 1024 for thousand in (264, 284, 304))


def products(rows: int, topology: str = "v5e:1x1", width: int = WIDTH, **declared: Any) -> Plan:
    def loss(params: Any, batch: Any) -> Any:
        def layer(x: Any, weights: Any) -> tuple[Any, None]:
            return jnp.tanh(x @ weights[0]) @ weights[1], None

        return jax.lax.scan(layer, batch["x"], params["layers"])[0].astype(jnp.float32).mean()

    params = {"layers": jax.ShapeDtypeStruct((LAYERS, 2, width, width), jnp.bfloat16)}
    batch = {"x": jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)}
    given = {"optimizer": optax.adamw(1e-3), "microbatches": 1, **declared}
    return plan(loss, params, batch, topology=topology, **given)


def notes_on(made: Plan) -> list[str]:
    return [note for note in made.notes if "--verify compiles it first" in note]


def test_a_faster_plan_that_may_fit_is_told_of_beside_what_surely_fits() -> None:
    made = products(NEARLY)
    assert made.remat == "full"
    [note] = notes_on(made)
    assert note.startswith("one device, remat=none, microbatches=1 is estimated at ")
    faster = products(NEARLY, remat="none")
    assert faster.estimate is not None
    assert made.estimate is not None
    share = 1 - faster.estimate.step_seconds / made.estimate.step_seconds
    assert share > 0.05
    assert f", {share:.0%} less, and fits only if the compiler leaves less memory free" in note


@pytest.mark.parametrize(("rows", "remat"), [(SURELY, "none"), (NEVER, "full")])
def test_nothing_is_said_of_what_surely_fits_or_is_too_large(rows: int, remat: str) -> None:
    made = products(rows)
    assert made.remat == remat
    assert notes_on(made) == []


def test_nothing_is_said_where_the_allocator_leaves_nothing_free_or_all_is_declared() -> None:
    found = [products(rows * 1024, "h100:1", 4 * WIDTH) for rows in range(210, 270, 20)]
    assert {made.remat for made in found} == {"none", "full"}
    assert not any(notes_on(made) for made in found)
    assert notes_on(products(NEARLY, remat="full")) == []


@pytest.mark.numerics(False)
def test_what_the_compiler_finds_too_large_leaves_the_plan_as_it_was(
    own_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real verdict, of more rows for the plan that may fit."""

    def of_more(judged: Plan, **program: Any) -> Verdict:
        if judged.remat == "none":
            judged = dataclasses.replace(products(NEVER), remat="none", saved={})
            program["batch"] = {"x": jax.ShapeDtypeStruct((NEVER, WIDTH), jnp.bfloat16)}
        return verify(judged, **program)

    monkeypatch.setattr("meshwright.sharding.verify.verify.verify", of_more)
    made = products(NEARLY)
    proved = made.verify(quick=True)
    assert proved.decision() == made.decision()
    assert proved.proof is not None
    assert notes_on(proved) == []
    [told] = [note for note in proved.notes if note.startswith("compiled and not taken")]
    assert "remat=none" in told
    assert "too much" in told


@pytest.mark.numerics(False)
def test_what_the_compiler_finds_to_fit_is_taken(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real verdict, of the plan that fits, is given for both."""
    made, asked = products(NEARLY), []

    def fitting(judged: Plan, *program: Any, **others: Any) -> Verdict:
        asked.append(judged.remat)
        return verify(dataclasses.replace(judged, remat="full", saved={}), *program, **others)

    monkeypatch.setattr("meshwright.sharding.verify.verify.verify", fitting)
    proved = made.verify(quick=True)
    assert asked == ["none"]
    assert proved.remat == "none"
    assert proved.proof is not None
    # The compiler has said what a note would send for.
    assert not any("--verify" in note for note in proved.notes)
    assert any(row.remat == "full" and "slower" in row.lost for row in proved.alternatives)
    asked.clear()
    made.verify(quick=True, top=2)
    assert asked[:2] == ["none", "full"]


@pytest.mark.slow
@pytest.mark.numerics(False)
def test_405b_over_two_slices_is_as_the_compiler_finds_it_to_fit(own_cache: None) -> None:
    """By the estimate alone it is cut into eight parts of each matrix, in a fifth more seconds."""
    made = plan_config(load(CONFIGS / "llama3-405b.yaml", ["topology=2*v6e:16x16"])).plan
    assert made.mesh["tensor"] == 8
    assert "tensor=4" in notes_on(made)[0]
    proved = made.verify(quick=True)
    assert proved.mesh["tensor"] == 4
    assert proved.proof is not None
    assert proved.proof.peak_bytes < 31.25 * 2**30
