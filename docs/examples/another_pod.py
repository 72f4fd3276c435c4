"""Plan Llama 3 8B for two pods that are not here, and put the plans side by side."""

import jax
import optax
from meshwright.models import decoder, preset
from meshwright.sharding import plan

ROWS, SEQUENCE = 512, 8192


def main() -> None:
    model = decoder(preset("llama3-8b", compute_dtype="bfloat16"))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    batch = dict.fromkeys(("tokens", "targets"), jax.ShapeDtypeStruct((ROWS, SEQUENCE), "int32"))
    plans = [
        plan(model.loss, params, batch, topology=pod, optimizer=optax.adamw(3e-4), names=model.names)
        for pod in ("v5p:4x4x8", "h100:16x8")
    ]
    for found in plans:
        assert found.estimate is not None
        peak, seconds = found.estimate.peak_bytes / 2**30, found.estimate.step_seconds
        print(f"{found.topology}: {found.mesh}, {seconds:.2f} s a step, {peak:.1f} GiB a device")
    print(plans[0].explain("tensor=8"))
    print(plans[0].compare(plans[1]))


if __name__ == "__main__":
    main()
