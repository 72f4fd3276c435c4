"""Train a small decoder of `meshwright.models` under a plan of which the mesh is declared."""

import jax
import optax
from meshwright.models import decoder, preset
from meshwright.runtime import simulate
from meshwright.sharding import plan

ROWS, SEQUENCE = 8, 32


def main() -> None:
    simulate(8)
    model = decoder(preset("tiny", layers=2))
    key = jax.random.key(0)
    tokens = jax.random.randint(key, (ROWS, SEQUENCE + 1), 0, model.config.vocab)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    optimizer = optax.adamw(1e-3)
    found = plan(
        model.loss,
        jax.eval_shape(model.init, key),
        batch,
        topology="cpu:8",
        optimizer=optimizer,
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
        names=model.names,
    )
    print(found.explain())
    state, step = found.init(model.init, key), found.train_step(model.loss, optimizer)
    state, metrics = step(state, batch)
    print(f"loss {float(metrics['loss']):.4f}, accuracy {float(metrics['accuracy']):.3f}")


if __name__ == "__main__":
    main()
