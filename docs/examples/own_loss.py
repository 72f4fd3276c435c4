"""Plan and train a function of one's own: nothing in it speaks of devices."""

import jax
import jax.numpy as jnp
import optax
from meshwright.runtime import simulate
from meshwright.sharding import Plan, plan

LAYERS, WIDTH, HIDDEN, ROWS = 4, 64, 256, 32


def init(key: jax.Array) -> dict[str, jax.Array]:
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (LAYERS, WIDTH, HIDDEN)) / WIDTH**0.5,
        "down": jax.random.normal(down, (LAYERS, HIDDEN, WIDTH)) / HIDDEN**0.5,
    }


def loss(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
    def layer(stream: jax.Array, weights: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        return stream + jax.nn.gelu(stream @ weights["up"]) @ weights["down"], None

    guess, _ = jax.lax.scan(layer, batch["x"], params)
    return jnp.mean((guess - batch["y"]) ** 2)


def main() -> None:
    simulate(8)
    key = jax.random.key(0)
    batch = {"x": jax.random.normal(key, (ROWS, WIDTH)), "y": jnp.ones((ROWS, WIDTH))}
    optimizer = optax.adamw(1e-3)
    found = plan(loss, jax.eval_shape(init, key), batch, topology="cpu:8", optimizer=optimizer)
    print(found.explain())

    state, step = found.init(init, key), found.train_step(loss, optimizer)
    for _ in range(5):
        state, metrics = step(state, batch)
        print(f"step {int(state['step'])}: loss {float(metrics['loss']):.4f}")

    found.save("own.plan.json")
    Plan.load("own.plan.json").check(state["params"], batch, loss)


if __name__ == "__main__":
    main()
