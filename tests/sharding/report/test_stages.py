"""A pipeline's picture: what runs where in a tick, as a terminal and a page show it, few ticks of many."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from meshwright.sharding import Plan, declare
from meshwright.sharding.report.html import page
from meshwright.sharding.report.plan import plan_document
from meshwright.sharding.report.terminal import plain_text


def planned(layers: int, stages: int, microbatches: int, interleave: int = 1, **more: Any) -> Plan:
    def loss(params: Any, x: Any) -> Any:
        return (jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0] ** 2).mean()

    params = {"w": jax.ShapeDtypeStruct((layers, 64, 64), "float32")}
    x = jax.ShapeDtypeStruct((microbatches * stages, 64), "float32")
    how = {"topology": f"cpu:{stages}", "mesh": {"stage": stages}, "names": {"w": ("layers", None, None)}}
    return declare(loss, params, x, microbatches=microbatches, interleave=interleave, **how, **more)


def picture(plan: Plan) -> list[str]:
    lines = plain_text(plan_document(plan)).splitlines()
    return lines[lines.index("pipeline") :]


def test_each_stage_has_its_microbatches_forward_and_backward() -> None:
    lines = picture(planned(4, 2, 3))
    words = " ".join(lines[1:3])
    assert "2 stages, 3 microbatches: 4 ticks forward" in words
    assert "in 1 of which a stage waits (25.0%)" in " ".join(words.split())
    rows = [line.split() for line in lines]
    assert ["stage", "0", "forward", *"012··"] in rows
    assert ["stage", "1", "forward", *"·012·"] in rows
    assert [row for row in rows if row[:1] == ["backward"]] == [
        ["backward", *"··012"],
        ["backward", *"·012·"],
    ]
    assert any("holds the inputs of 3 chunks" in line for line in lines)


def test_chunks_are_letters_and_of_many_ticks_and_stages_few_are_drawn() -> None:
    plan = planned(40, 10, 40, interleave=2)
    lines = picture(plan)
    assert max(map(len, lines)) <= 80
    (first,) = [line.split() for line in lines if line.strip().startswith("stage 0 forward")]
    assert first[3:6] == ["0a", "1a", "2a"]
    assert "…" in first
    assert len(first) - 3 <= 16
    assert not [line for line in lines if line.strip().startswith("stage 5 ")]
    whole = page(plan_document(plan))
    assert '<svg class="ticks"' in whole
    assert "backward, the chunk run again" in whole


def test_gradients_of_weights_that_are_delayed_have_a_row_in_which_no_stage_waits() -> None:
    lines = picture(planned(4, 2, 3, schedule="delayed"))
    rows = [line.split() for line in lines]
    assert ["backward", *"··012·"] in rows
    assert rows.count(["weights", *"···012"]) == 2
    words = " ".join(" ".join(lines).split())
    assert "gradients of weights take 3 ticks, in which none waits" in words
    assert "what the gradients of 2 chunks' weights are made of" in words


def test_it_says_what_is_held_where_chunks_are_not_run_again() -> None:
    plan = planned(4, 2, 3, remat="full", stage_remat=False)
    assert any("holds what layers keep of 3 chunks" in line for line in picture(plan))
    assert "run again" not in page(plan_document(plan))


def test_layers_that_stages_do_not_divide_are_said_with_their_copies() -> None:
    assert "2 of 7 layers, 1 of all stages' filled with copies" in " ".join(
        " ".join(picture(planned(7, 4, 4))).split()
    )


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_a_plan_without_stages_has_no_picture(axis: str) -> None:
    def loss(params: Any, x: Any) -> Any:
        return ((x @ params["w"]) ** 2).mean()

    shapes = {"w": jax.ShapeDtypeStruct((64, 64), "float32")}
    x = jax.ShapeDtypeStruct((8, 64), "float32")
    plan = declare(loss, shapes, x, topology="cpu:2", mesh={axis: 2})
    assert "pipeline" not in plain_text(plan_document(plan))


def test_every_stack_of_layers_has_its_rows() -> None:
    def loss(params: Any, x: Any) -> Any:
        for name in ("encoder", "decoder"):
            x = jax.lax.scan(lambda x, w: (x @ w, None), x, params[name])[0]
        return (x**2).mean()

    params = {
        name: jax.ShapeDtypeStruct((layers, 64, 64), "float32")
        for name, layers in (("encoder", 5), ("decoder", 8))
    }
    x = jax.ShapeDtypeStruct((6, 64), "float32")
    plan = declare(loss, params, x, topology="cpu:2", mesh={"stage": 2}, microbatches=3)
    lines = picture(plan)
    rows = [line.split() for line in lines]
    assert ["stage", "0", "encoder", "forward", *"012······"] in rows
    assert ["decoder", "forward", *"···012···"] in rows
    assert [row for row in rows if row[:1] == ["backward"]] == [
        ["backward", *"······012"],
        ["backward", *"····012··"],
        ["backward", *"·····012·"],
        ["backward", *"···012···"],
    ]
    words = " ".join(" ".join(lines).split())
    assert "2 stages, 2 stacks of layers, 3 microbatches: 4 ticks forward" in words
    assert "the inputs of 7 chunks of encoder and 3 chunks of decoder" in words
    assert "3 of 5 layers of encoder, 1 of all stages' filled" in words
    whole = page(plan_document(plan))
    assert whole.count(">decoder</text>") == 2
    assert Plan.from_dict(plan.to_dict()).stacks == {"encoder": 5, "decoder": 8}
