"""Errors and notes name the user's own line, not a library's."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from IPython.core.interactiveshell import InteractiveShell
from meshwright.sharding import UserError, declare
from meshwright.sharding.plans.proof import nearby
from meshwright.sharding.program import trace
from traitlets.config import Config


def test_a_layer_of_a_library_stands_for_the_line_that_calls_it() -> None:
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def loss(params, batch):
        return model(batch).sum() * params

    shapes = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((8, 4), jnp.float32)
    program = trace(loss, *shapes)
    line = loss.__code__.co_firstlineno + 1
    places = {where for _, where in program.located()}
    assert places == {f"{__file__}:{line} (loss)"}


@pytest.fixture
def notebook() -> Iterator[InteractiveShell]:
    """Return a shell that runs cells, as those of a notebook are run."""
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    yield shell
    InteractiveShell.clear_instance()


def test_a_cell_of_a_notebook_is_named_by_its_number(notebook: InteractiveShell) -> None:
    notebook.run_cell("import jax.numpy as jnp", store_history=True)
    notebook.run_cell("def loss(w, x):\n    return jnp.sort(x @ w, 0).mean()", store_history=True)
    loss = notebook.user_ns["loss"]
    shapes = jax.ShapeDtypeStruct((4, 4), jnp.float32), jax.ShapeDtypeStruct((8, 4), jnp.float32)
    assert {where for _, where in trace(loss, *shapes).located()} == {"In[2]:2 (loss)"}
    with pytest.raises(UserError, match=r"In\[2\]:2"):
        declare(loss, *shapes, topology="cpu:2", mesh={"data": 2}, microbatches=2)
    assert nearby(loss.__code__.co_filename) == "In[2]"
