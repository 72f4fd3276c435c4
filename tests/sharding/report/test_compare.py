"""Two plans side by side: what they do differently, and what each costs."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.sharding import Plan, plan
from meshwright.sharding.plans.proof import CompiledCollective, Finding, Proof
from meshwright.sharding.report.compare import compare
from rich.console import Console

GIB = 2.0**30


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((jax.nn.gelu(batch["x"] @ params["up"]) @ params["down"] - batch["x"]) ** 2)


def other_loss(params: Any, batch: Any) -> Any:
    return jnp.mean(jnp.abs(jax.nn.gelu(batch["x"] @ params["up"]) @ params["down"]))


def planned(width: int = 4096, topology: str = "v5p:2x2x4", of: Any = loss, **declared: Any) -> Plan:
    params = {
        "up": jax.ShapeDtypeStruct((1024, width), "float32"),
        "down": jax.ShapeDtypeStruct((width, 1024), "float32"),
    }
    batch = {"x": jax.ShapeDtypeStruct((4096, 1024), "float32")}
    return plan(of, params, batch, topology=topology, optimizer=optax.adamw(1e-3), **declared)


def proof(seconds: float, *collectives: tuple[str, float], **changes: Any) -> Proof:
    rows = tuple(
        CompiledCollective(
            kind="all_gather",
            axes=(axis,),
            count=2,
            bytes=GIB,
            wire_bytes=GIB,
            seconds=time,
            exposed_seconds=time / 2,
            algorithm="",
            asynchronous=True,
        )
        for axis, time in collectives
    )
    record = Proof(
        topology="v5p:2x2x4",
        versions={"jaxlib": "0.10.2", "libtpu": "0.0.42.1"},
        peak_bytes=GIB,
        step_seconds=seconds,
        compile_seconds=1.0,
        time={"compute": seconds},
        memory={"arguments": GIB},
        collectives=rows,
    )
    return dataclasses.replace(record, **changes)


@pytest.fixture(scope="module")
def pair() -> tuple[Plan, Plan]:
    return planned(mesh={"fsdp": 16}), planned(mesh={"fsdp": 4, "tensor": 4}, microbatches=2)


def terminal(first: Plan, second: Plan) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(compare(first, second, ("a.plan.json", "b.plan.json")))
    return console.file.getvalue()  # type: ignore[attr-defined]


def as_dict(first: Plan, second: Plan) -> dict[str, Any]:
    return compare(first, second).to_dict()


def row(text: str, name: str) -> list[str]:
    """Return the words of the first row with `name`, without its bars."""
    rows = [re.sub("[█▀▄░▏]", " ", line).split() for line in text.splitlines()]
    return next(words for words in rows if words[: len(name.split())] == name.split())


def test_what_differs_is_told_and_nothing_else(pair: tuple[Plan, Plan]) -> None:
    differs = as_dict(*pair)["differs"]
    assert differs["mesh"] == {"fsdp": (16, 4), "tensor": (None, 4)}
    assert differs["values"] == {"microbatches": (1, 2)}
    changed = {path for path, one in pair[0].params.items() if one.spec != pair[1].params[path].spec}
    assert changed
    assert set(differs["params"]) == changed
    assert not {"saved", "kernels", "compiled", "compiler_options"} & set(differs)


def test_a_plan_is_like_itself(pair: tuple[Plan, Plan]) -> None:
    same = compare(pair[0], pair[0])
    assert not same.differs
    assert not same.unlike
    assert "they choose alike" in repr(same)


def test_every_choice_is_compared(pair: tuple[Plan, Plan]) -> None:
    chosen = {
        "compiler_options": {"xla_flag": True},
        "saved": {"hidden": "host"},
        "kernels": {"attention": {"implementation": "cudnn"}},
        "moments": {"up": ("fsdp", None)},
    }
    for name, value in chosen.items():
        remat = "names" if name == "saved" else "none"
        differs = as_dict(pair[0], dataclasses.replace(pair[0], remat=remat, **{name: value}))["differs"]
        ((key, wanted),) = value.items()
        found = differs[name][key]
        assert found == (None, list(wanted) if isinstance(wanted, tuple) else wanted)


def test_costs_stand_beside_their_difference_and_ratio(pair: tuple[Plan, Plan]) -> None:
    first = dataclasses.replace(pair[0], proof=proof(0.4, ("fsdp", 0.1)))
    second = dataclasses.replace(pair[1], proof=proof(0.5, ("fsdp", 0.05), ("tensor", 0.2)))
    text = terminal(first, second)
    assert max(map(len, text.splitlines())) <= 80
    compiled = text[text.index("\ncompiled") :]
    assert row(compiled, "step") == ["step", "400", "ms", "500", "ms", "+100", "ms", "1.25"]
    assert row(compiled, "memory") == ["memory", "1.0", "GiB", "1.0", "GiB", "same", "1.00"]
    talk = text[text.index("\ncollectives") :]
    assert row(talk, "all_gather/fsdp")[1:] == ["100", "ms", "50", "ms", "-50", "ms", "0.50"]
    # What one program lacks is nothing there, and has no ratio.
    assert row(talk, "all_gather/tensor")[1:] == ["0", "200", "ms", "+200", "ms"]
    record = as_dict(first, second)
    assert record["collectives"]["all_gather/tensor"]["exposed_seconds"] == (0.0, 0.1)
    assert first.estimate is not None
    assert second.estimate is not None
    assert record["estimated"]["step_seconds"] == (first.estimate.step_seconds, second.estimate.step_seconds)
    for side in (0, 1):
        items = [both[side] for both in record["estimated"]["time"].values()]
        assert sum(items) == pytest.approx(record["estimated"]["step_seconds"][side])


def test_rounding_is_no_difference(pair: tuple[Plan, Plan]) -> None:
    first, second = (
        dataclasses.replace(one, proof=proof(seconds))
        for one, seconds in zip(pair, (0.4, 0.40001), strict=True)
    )
    text = terminal(first, second)
    assert row(text[text.index("\ncompiled") :], "step")[5:] == ["same", "1.00"]
    assert as_dict(first, second)["compiled"]["step_seconds"] == (0.4, 0.40001)


def test_collectives_that_are_alike_but_for_their_algorithm_are_one(pair: tuple[Plan, Plan]) -> None:
    first = dataclasses.replace(pair[0], proof=proof(0.4, ("fsdp", 0.1), ("fsdp", 0.2)))
    sums = as_dict(first, first)["collectives"]["all_gather/fsdp"]
    assert sums["seconds"] == pytest.approx((0.3, 0.3))
    assert sums["count"] == (4, 4)


def test_one_proof_stands_beside_nothing(pair: tuple[Plan, Plan]) -> None:
    proved = dataclasses.replace(pair[0], proof=proof(0.4, ("fsdp", 0.1)))
    text = terminal(proved, pair[1])
    assert row(text[text.index("\ncompiled") :], "step") == ["step", "400", "ms", "-"]
    assert as_dict(proved, pair[1])["collectives"]["all_gather/fsdp"]["seconds"] == (0.1, None)
    bare = as_dict(*pair)
    assert bare["compiled"] is None
    assert bare["collectives"] == {}


def test_other_programs_topologies_and_compilers_are_said_to_be_so_first(pair: tuple[Plan, Plan]) -> None:
    assert as_dict(*pair)["unlike"] == ()
    (shapes,) = as_dict(pair[0], planned(2048, mesh={"fsdp": 16}))["unlike"]
    assert shapes.startswith("they are for different programs: ")
    assert "up is float32[1024, 4096] and float32[1024, 2048]" in shapes
    (work,) = as_dict(pair[0], planned(of=other_loss, mesh={"fsdp": 16}))["unlike"]
    assert "different programs: " in work
    assert "abs 0 and 1 times" in work
    (where,) = as_dict(pair[0], planned(topology="v5e:4x8"))["unlike"]
    assert where == "they are for different topologies: v5p:2x2x4 and v5e:4x8, 16 and 32 devices"
    newer = proof(0.4, versions={"jaxlib": "0.12.0", "libtpu": "0.0.50.1"})
    first, second = (
        dataclasses.replace(one, proof=made) for one, made in zip(pair, (proof(0.4), newer), strict=True)
    )
    (compilers,) = as_dict(first, second)["unlike"]
    assert compilers == "they were compiled by different compilers: libtpu 0.0.42.1 and libtpu 0.0.50.1"
    lines = terminal(first, second).splitlines()
    assert next(n for n, line in enumerate(lines) if "different compilers" in line) < lines.index(
        next(line for line in lines if "do differently" in line)
    )


def test_what_was_found_in_one_plan_alone_is_listed(pair: tuple[Plan, Plan]) -> None:
    both = Finding(kind="a", what="found in both", remedy="")
    alone = Finding(kind="b", what="an all-gather over tensor", remedy="")
    first = dataclasses.replace(pair[0], proof=proof(0.4, findings=(both,)))
    second = dataclasses.replace(pair[1], proof=proof(0.4, findings=(both, alone)))
    text = terminal(first, second)
    assert "found in A alone" not in text
    assert text[text.index("found in B alone") :].split("\n")[1].strip() == alone.what


def test_a_comparison_is_data_text_and_markup(pair: tuple[Plan, Plan]) -> None:
    made = pair[0].compare(dataclasses.replace(pair[1], proof=proof(0.4, ("fsdp", 0.1))))
    assert json.loads(json.dumps(made.to_dict()))["differs"]["mesh"] == {"fsdp": [16, 4], "tensor": [None, 4]}
    assert "what they do differently" in repr(made)
    html = made._repr_html_()
    assert "<script" not in html
    assert html.count("<table") == html.count("</table>")
    assert "all_gather/fsdp" in html


def test_both_views_tell_all_that_was_found(pair: tuple[Plan, Plan]) -> None:
    alone = tuple(Finding(kind="b", what=f"finding number {n}", remedy="") for n in range(9))
    first = dataclasses.replace(pair[0], proof=proof(0.4))
    second = dataclasses.replace(pair[1], proof=proof(0.4, findings=alone))
    text, html = terminal(first, second), compare(first, second)._repr_html_()
    assert "finding number 7" in text
    assert "and 1 more" in text
    assert all(one.what in html for one in alone)


def test_small_items_are_summed_up(pair: tuple[Plan, Plan]) -> None:
    small = {"compute": 0.4, "host": 1e-4, "prefetch": 2e-4}
    first, second = (
        dataclasses.replace(one, proof=proof(0.4, time=time))
        for one, time in zip(pair, (small, {"compute": 0.4, "host": 2e-4}), strict=True)
    )
    text = terminal(first, second)
    compiled = text[text.index("\ncompiled") :]
    assert row(compiled, "the rest") == ["the", "rest", "300", "µs", "200", "µs", "-100", "µs", "0.67"]


def test_both_bars_of_a_row_stand_in_one_line(pair: tuple[Plan, Plan]) -> None:
    first, second = (
        dataclasses.replace(one, proof=proof(seconds)) for one, seconds in zip(pair, (0.2, 0.4), strict=True)
    )
    for plans, longer in (((first, second), "▄"), ((second, first), "▀")):
        text = terminal(*plans)
        step = next(line for line in text[text.index("\ncompiled") :].splitlines() if " step " in line)
        bar = re.sub("[^█▀▄]", "", step)
        assert bar.count("█") == pytest.approx(bar.count(longer), abs=1)
        assert bar == "█" * bar.count("█") + longer * bar.count(longer)
