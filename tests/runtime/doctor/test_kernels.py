"""Kernels of attention compared with plain attention in float32, on the CPU that is here."""

from __future__ import annotations

import pathlib

import jax.numpy as jnp
import pytest
from meshwright.runtime.doctor import kernels
from meshwright.runtime.doctor.kernels import SHAPES, Compared, compare, compare_kernels

pytestmark = pytest.mark.numerics


def test_xla_in_chunks_is_right_in_all_layouts() -> None:
    found = list(compare("xla", SHAPES[1:2]))
    assert [case.layout for case in found] == [
        "one segment",
        "many",
        "padding at the end",
        "as many as may be",
    ]
    assert all(case.passed for case in found)


def test_a_kernel_that_overlooks_segments_or_gives_no_numbers_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = kernels.attention

    def blind(query, key, value, *, segment_ids, chunk):
        out = whole(query, key, value, segment_ids=segment_ids if chunk == 256 else None)
        return jnp.where(segment_ids[..., None, None] == 16, jnp.nan, out) if chunk == 64 else out

    monkeypatch.setattr(kernels, "attention", blind)
    one, many, _, most = compare("xla", [(4, 4, 16, 16)])
    # Chunks are what the comparison gives XLA and not the plain maths beside it.
    assert (one.passed, many.passed, most.passed) == (True, False, False)
    assert one.worst is not None
    assert most.worst is None


def test_the_outcome_is_kept_for_the_device_and_versions_it_is_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    good = {"shape": [1], "layout": "many", "worst": 1.5, "why": None, "refused": False}
    answers = {
        "here": [{"platform": "gpu", "here": "a GPU, jax 1"}],
        "xla": [good],
        "cudnn": [good, {**good, "worst": None, "why": "it needs", "refused": True}],
        "cudnn_packed": [good, {**good, "worst": 4.5}],
    }
    monkeypatch.setattr(kernels, "_asked", lambda what, _: (answers.get(what, []), None))
    checks = {check.name: check for check in compare_kernels()}
    assert checks["attention by cudnn"].status == "ok"
    assert checks["attention by cudnn"].value.startswith("1 of 1 within")
    assert checks["attention by cudnn_packed"].status == "bad"
    assert "4.5 times" in checks["attention by cudnn_packed"].advice
    assert "not compared" in checks["attention by splash"].value
    monkeypatch.setattr(kernels, "attached_accelerators", lambda: ["gpu"])
    monkeypatch.setattr(kernels, "_here", lambda: "a GPU, jax 1")
    assert set(kernels.compared()) == {"xla", "cudnn"}
    monkeypatch.setattr(kernels, "_here", lambda: "a GPU, jax 2")
    assert kernels.compared() == ()


def test_what_is_not_a_number_is_no_pass() -> None:
    assert not Compared(shape=(1,), layout="many").passed
