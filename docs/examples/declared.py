"""Declare a layout, some of it by named dimensions and some by a parameter's path, and draw it."""

import jax
import jax.numpy as jnp
import optax
from meshwright.runtime import simulate
from meshwright.sharding import declare, picture, train_step


def init(key: jax.Array) -> dict[str, jax.Array]:
    table, up, down = jax.random.split(key, 3)
    return {
        "table": jax.random.normal(table, (96, 64)),
        "up": jax.random.normal(up, (64, 256)) / 8,
        "down": jax.random.normal(down, (256, 64)) / 16,
    }


def loss(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
    stream = params["table"][batch["tokens"]]
    stream = stream + jax.nn.gelu(stream @ params["up"]) @ params["down"]
    logits = stream @ params["table"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def main() -> None:
    simulate(8)
    key = jax.random.key(0)
    tokens = jax.random.randint(key, (16, 33), 0, 96)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    optimizer = optax.adamw(1e-2)
    plan = declare(
        loss,
        jax.eval_shape(init, key),
        batch,
        topology="cpu:8",
        optimizer=optimizer,
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
        names={"table": ("vocab", "embed"), "up": ("embed", "mlp"), "down": ("mlp", "embed")},
        rules={"mlp": "tensor", "*table": [None, "fsdp"]},  # a dimension; a path, which takes precedence
        microbatches=2,
    )
    for note in plan.notes:
        print("note:", note)

    step = train_step(plan, loss, init, batch, optimizer, mesh=plan.make_mesh())
    state = step.init(key)
    state, metrics = step.update(state, jax.device_put(batch, step.batch))
    print(f"loss {float(metrics['loss']):.4f}, gradients' norm {float(metrics['grad_norm']):.4f}")
    print(picture(state["params"]["up"]))
    assert jnp.isfinite(metrics["loss"])


if __name__ == "__main__":
    main()
