"""Errors that end a process, or are raised as ever. Those of several processes: `tests/runtime/launch`."""

from __future__ import annotations

import jax
import pytest
from meshwright.runtime.faults import fail_fast, is_lost_peer


def test_lost_peer_is_told_from_other_errors() -> None:
    gone = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:34567"
    assert is_lost_peer(jax.errors.JaxRuntimeError(gone))
    assert not is_lost_peer(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert not is_lost_peer(ValueError("a peer"))


def test_an_error_of_a_single_process_is_raised_as_ever() -> None:
    with pytest.raises(ZeroDivisionError), fail_fast():
        _ = 1 / 0
