"""Flax's own examples as they are: do they plan, keep their values, and how well are they laid out?

    python benchmarks/flax_examples.py FOLDER [NAME ...] [--values]

FOLDER holds a checkout of https://github.com/google/flax; the figures in docs/figures.md are of commit
18f8f311. Models and losses are those of `examples/`: `lm1b` and `wmt` (Linen, packed rows, smoothed targets)
and `gemma` (NNX, packed and padded rows). Each is planned with AdamW, parameters float32 and values bfloat16,
which is a setting of the examples. With `--values` a small one is run on eight simulated devices and compared
with plain JAX.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from measured.outside import Problem, compared, drawn, planned, shapes
from meshwright.runtime import simulate

Row = dict[str, tuple[Any, ...]]


def _module(folder: Path, example: str, name: str) -> Any:
    """Return a module of an example by the name that its siblings import it by."""
    sys.path.insert(0, str(folder / "examples" / example))
    # Two examples have one of this name.
    sys.modules.pop("models", None)
    return importlib.import_module(name)


def _smoothed(logits: Any, targets: Any, weights: Any, smoothing: float = 0.1) -> Any:
    """Return the cross-entropy of smoothed targets, as these examples sum and divide it."""
    size = logits.shape[-1]
    low = smoothing / (size - 1)
    soft = jax.nn.one_hot(targets, size) * (1 - smoothing - low) + low
    losses = -jnp.sum(soft * jax.nn.log_softmax(logits), axis=-1) * weights
    return losses.sum() / weights.sum()


def _linen(loss: Callable[[Any, Any], Any], init: Callable[[], Any]) -> Problem:
    def made() -> Any:
        return init()["params"], None

    return Problem(loss=loss, params=jax.eval_shape(made)[0], rest=None, made=made)


def _config(models: Any, width: int, layers: int, length: int, size: int, *, head: int) -> Any:
    """Return the settings of `lm1b` or `wmt`; a small one has four heads, and values in float32."""
    small = width < head
    return models.TransformerConfig(
        vocab_size=size,
        output_vocab_size=size,
        emb_dim=width,
        num_heads=width // head or 4,
        num_layers=layers,
        qkv_dim=width,
        mlp_dim=4 * width,
        max_len=length,
        dtype=jnp.float32 if small else jnp.bfloat16,
        deterministic=True,
    )


def _packed(length: int, size: int) -> Row:
    return {
        "inputs": (length, "int32", size),
        "positions": (length, "int32", length),
        "segments": (length, "int32", 3),
    }


def lm1b(folder: Path, small: bool) -> tuple[Problem, Row]:
    """Return a decoder of packed rows: 1.3e9 parameters, rows of 2,048 tokens."""
    models = _module(folder, "lm1b", "models")
    width, layers, length, size = (32, 2, 16, 96) if small else (2048, 24, 2048, 32000)
    config = _config(models, width, layers, length, size, head=128)
    model = models.TransformerLM(config)

    def loss(params: Any, batch: Any) -> Any:
        tokens = batch["inputs"]
        logits = model.apply(
            {"params": params},
            tokens,
            inputs_positions=batch["positions"],
            inputs_segmentation=batch["segments"],
        )
        return _smoothed(logits, tokens, (tokens > 0).astype(jnp.float32))

    init = functools.partial(model.init, jax.random.key(0), jnp.ones((1, length), jnp.int32))
    return _linen(loss, init), _packed(length, size)


def wmt(folder: Path, small: bool) -> tuple[Problem, Row]:
    """Return an encoder and a decoder of packed pairs: 0.27e9 parameters, rows of 256 tokens each."""
    models = _module(folder, "wmt", "models")
    width, layers, length, size = (32, 2, 16, 96) if small else (1024, 6, 256, 32000)
    config = _config(models, width, layers, length, size, head=64)
    model = models.Transformer(config)

    def loss(params: Any, batch: Any) -> Any:
        targets = batch["targets"]
        logits = model.apply(
            {"params": params},
            batch["inputs"],
            targets,
            inputs_positions=batch["positions"],
            targets_positions=batch["targets_positions"],
            inputs_segmentation=batch["segments"],
            targets_segmentation=batch["targets_segments"],
        )
        return _smoothed(logits, targets, (targets > 0).astype(jnp.float32))

    ones = jnp.ones((1, length), jnp.int32)
    init = functools.partial(model.init, jax.random.key(0), ones, ones)
    row = _packed(length, size)
    others = {"targets" if name == "inputs" else f"targets_{name}": one for name, one in row.items()}
    return _linen(loss, init), row | others


def _gemma(make: Callable[[Any], Any], length: int, size: int) -> Callable[..., tuple[Problem, Row]]:
    def problem(folder: Path, small: bool) -> tuple[Problem, Row]:
        models = _module(folder, "gemma", "transformer")
        configs = _module(folder, "gemma", "transformer_cfg")
        own, rows, vocabulary = make(configs.TransformerConfig), length, size
        if small:
            own, rows, vocabulary = _small_gemma(configs), 16, 96

        def module() -> Any:
            return models.Transformer(own, rngs=nnx.Rngs(0))

        graph, _ = nnx.split(nnx.eval_shape(module))

        def loss(params: Any, batch: Any) -> Any:
            tokens, segments = batch["inputs"], batch["segments"]
            mask = models.make_causal_attn_mask(tokens > 0)
            mask = jnp.logical_and(segments[:, :, None] == segments[:, None, :], mask)
            model = nnx.merge(graph, params)
            logits, _ = model(
                tokens, positions=batch["positions"], cache=None, attention_mask=mask, rngs=None
            )
            return _smoothed(logits, batch["targets"], (batch["targets"] > 0).astype(jnp.float32), 0.0)

        def made() -> Any:
            return nnx.split(module())[1], None

        row = _packed(rows, vocabulary) | {"targets": (rows, "int32", vocabulary)}
        return Problem(loss=loss, params=jax.eval_shape(made)[0], rest=None, made=made), row

    return problem


def _small_gemma(configs: Any) -> Any:
    kinds = configs.AttentionType
    return configs.TransformerConfig(
        num_layers=4,
        num_embed=96,
        embed_dim=32,
        hidden_dim=64,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL) * 2,
        attn_logits_soft_cap=50.0,
        sliding_window_size=4,
        use_qk_norm=True,
    )


BFLOAT16 = {"dtype": jnp.bfloat16}
# A problem of each name, full or small, and how many rows it is planned for.
CASES: dict[str, tuple[Callable[..., tuple[Problem, Row]], int]] = {
    "lm1b": (lm1b, 256),
    "wmt": (wmt, 2048),
    "gemma-2b": (_gemma(lambda kind: kind.gemma_2b(**BFLOAT16), 4096, 256128), 256),
    "gemma2-2b": (_gemma(lambda kind: kind.gemma2_2b(**BFLOAT16), 4096, 256128), 256),
    "gemma3-1b": (_gemma(lambda kind: kind.gemma3_1b(**BFLOAT16), 4096, 262144), 256),
}


def main() -> None:
    """Plan the examples that are named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a checkout of google/flax")
    parser.add_argument("names", nargs="*", choices=[*CASES, []], help="examples, all by default")
    parser.add_argument("--values", action="store_true", help="also run small ones")
    asked = parser.parse_args()
    simulate(8)
    for name in asked.names or CASES:
        make, rows = CASES[name]
        problem, row = make(asked.folder, False)
        for line in planned(f"{name}, {rows} of {row}", problem, shapes(row, rows)):
            print(line, flush=True)
        if asked.values:
            problem, row = make(asked.folder, True)
            print(compared(problem, drawn(row, 8)), flush=True)


if __name__ == "__main__":
    main()
