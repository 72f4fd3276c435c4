"""A program run again, equation by equation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax import lax
from jax.extend import core
from meshwright.sharding.program import trace
from meshwright.sharding.program.jaxpr import Go, Pass, rewritten

X = jnp.arange(1.0, 7.0).reshape(2, 3)


def again(function: Any, *args: Any, passes: Sequence[Pass] = ()) -> Any:
    program = trace(function, *args)
    found = rewritten(program, passes, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(function, *args)), found)


def backwards(x: Any) -> Any:
    return lax.scan(lambda c, row: (c * 2 + row.sum(), c), 1.0, x, reverse=True, unroll=2)


def counted(x: Any) -> Any:
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2), (0, x))


def nested(x: Any) -> Any:
    @jax.jit
    def inner(x: Any) -> Any:
        return lax.scan(lambda c, row: (jax.checkpoint(jnp.sin)(c) + row, None), x[0], x)[0]

    return lax.cond(x.sum() > 0, inner, lambda x: x[0], x), jax.nn.relu(x)


@pytest.mark.parametrize("function", [backwards, counted, nested])
def test_without_passes_it_gives_the_same(function: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, again(function, X), function(X))
    expected = jax.make_jaxpr(function)(X)
    found = jax.make_jaxpr(lambda x: again(function, x))(X)
    assert [e.primitive for e in found.jaxpr.eqns if e.primitive.name != "jit"] == [
        e.primitive for e in expected.jaxpr.eqns if e.primitive.name != "jit"
    ]


def test_a_models_gradients_stay_the_same() -> None:
    case = zoo.MODELS["decoder"]()
    params, batch = (jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), tree) for tree in case.shapes())
    expected = jax.jit(jax.grad(case.loss))(params, batch)
    got = jax.jit(jax.grad(lambda params: again(case.loss, params, batch)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), got, expected)


class Logged(Pass):
    """Writes down what it is asked about, and what is run inside of a scan."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def visit(self, equation: Any, inputs: list[Any], go: Go) -> Sequence[Any]:
        self.log.append(f"{self.name} {equation.primitive}")

        def around(body: Any) -> Any:
            def logged(args: list[Any]) -> list[Any]:
                self.log.append(f"{self.name} enters")
                return body(args)

            return logged

        return go(inputs, around)


def test_the_first_pass_is_asked_first_and_is_innermost_around_a_body() -> None:
    def summed(x: Any) -> Any:
        return lax.scan(lambda c, row: (c + row, None), x[0], x)[0]

    log: list[str] = []
    again(summed, X, passes=[Logged("a", log), Logged("b", log)])
    scan = log.index("a scan")
    assert log[scan : scan + 6] == ["a scan", "b scan", "b enters", "a enters", "a add", "b add"]


class Doubled(Pass):
    """Doubles what goes into a scope of the program and halves what comes out."""

    def begin(self, scope: Any, inputs: list[Any]) -> list[Any]:
        return [2 * value for value in inputs]

    def end(self, scope: Any, outputs: list[Any]) -> list[Any]:
        return [value / 2 for value in outputs]


def test_a_pass_has_a_say_where_scopes_begin_and_end() -> None:
    np.testing.assert_array_equal(again(lambda x: x * x, X, passes=[Doubled()]), 2 * X * X)


@jax.tree_util.register_pytree_node_class
class Pair:
    """A value in two halves, a pytree of a pass's own."""

    def __init__(self, left: Any, right: Any) -> None:
        self.left, self.right = left, right

    def tree_flatten(self) -> Any:
        return (self.left, self.right), None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> Pair:
        return cls(*children)


class Halves(Pass):
    """Hands every argument on as a Pair, into loops and checkpoints too; adds its halves where it is used."""

    def __init__(self, program: Any) -> None:
        self.program = program

    def begin(self, scope: Any, inputs: list[Any]) -> list[Any]:
        return [Pair(x / 2, x / 2) for x in inputs] if scope is self.program.scope else inputs

    def visit(self, equation: Any, inputs: list[Any], go: Go) -> Sequence[Any]:
        if equation.scopes:
            return go(inputs)
        return go([x.left + x.right if isinstance(x, Pair) else x for x in inputs])


def test_values_of_a_passs_own_go_through_loops_and_checkpoints() -> None:
    @jax.checkpoint
    def squared(x: Any) -> Any:
        return x * x

    def function(x: Any, y: Any) -> Any:
        total, _ = lax.scan(lambda c, row: (c + row.sum(), None), 0.0, x)
        return total + jax.jit(squared)(y).sum()

    program = trace(function, X, X)
    (found,) = rewritten(program, [Halves(program)], [X, X])
    np.testing.assert_allclose(found, function(X, X))


def test_equations_keep_their_lines_names_and_settings() -> None:
    def function(x: Any) -> Any:
        with jax.named_scope("inner"), jax.default_matmul_precision("float32"):
            return x @ x.T

    text = jax.jit(lambda x: again(function, x)).lower(X).as_text(debug_info=True)
    assert "inner" in text
    assert "test_jaxpr.py" in text
    assert "HIGHEST" in text or "FLOAT32" in text.upper()


def test_a_call_with_a_rule_of_its_own_is_one_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    from meshwright.sharding.program import einsum_rule, op_rules, register_op_rule

    monkeypatch.setattr(op_rules, "_users", {})
    register_op_rule("jit:block", lambda op: einsum_rule(op, "nd -> nd"))

    @jax.jit
    def block(x: Any) -> Any:
        return jnp.cumsum(x, axis=0)

    log: list[str] = []
    np.testing.assert_allclose(again(lambda x: block(x) + 1, X, passes=[Logged("a", log)]), block(X) + 1)
    assert log == ["a jit", "a add"]
    program = jax.make_jaxpr(lambda x: again(lambda x: block(x) + 1, x))(X)
    assert [e.primitive.name for e in program.jaxpr.eqns] == ["jit", "add"]
    assert isinstance(program.jaxpr.eqns[0], core.JaxprEqn)
