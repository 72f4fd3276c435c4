"""Public models as their authors wrote them: do they plan, keep their values, and how well are they laid out?

    python benchmarks/public_models.py FOLDER [NAME ...] [--values]

FOLDER holds a checkout of https://github.com/jax-ml/bonsai; the figures in docs/figures.md are of commit
36284254. Each model is planned in full size with AdamW, its parameters float32 and cast to bfloat16 in the
loss. With `--values` a small one of the kind is run on eight simulated devices and compared with plain JAX.
Some of the modules want packages that this project does not (`jaxtyping`, `pillow`, `tqdm`).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from measured.outside import Problem, compared, drawn, planned, shapes
from meshwright.runtime import simulate

Loss = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model, in full size and small: how it is made, what a row of its batch is, what is minimised."""

    module: str
    full: Callable[[Any], Callable[[nnx.Rngs], nnx.Module]]
    small: Callable[[Any], Callable[[nnx.Rngs], nnx.Module]]
    row: dict[str, tuple[Any, ...]]
    small_row: dict[str, tuple[Any, ...]]
    rows: int
    loss: Loss


def _classified(model: Any, batch: Any, **options: Any) -> Any:
    return _cross_entropy(model(batch["image"], **options), batch["label"])


def _cross_entropy(logits: Any, labels: Any) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return losses.mean()


def _distance(found: Any, wanted: Any) -> Any:
    return jnp.mean(jnp.square(found.astype(jnp.float32) - wanted.astype(jnp.float32)))


def _image(size: int, classes: int = 1000) -> dict[str, tuple[Any, ...]]:
    return {"image": (size, size, 3, "bfloat16"), "label": ("int32", classes)}


def _qwen3(model: Any, batch: Any) -> Any:
    from bonsai.models.qwen3 import modeling  # pyright: ignore[reportMissingImports]

    tokens = batch["tokens"]
    cache = modeling.init_cache(model.config, *tokens.shape, 0)
    logits = model(tokens, cache=cache, segment_ids=jnp.ones_like(tokens))
    return _cross_entropy(logits[:, :-1], tokens[:, 1:])


def _whisper(model: Any, batch: Any) -> Any:
    heard = model.encoder(batch["sound"])
    tokens = batch["tokens"]
    mask = nnx.make_causal_mask(tokens)
    states = model.decoder(tokens, mask, heard, None, decode=False)
    return _cross_entropy(model.decoder.embed_tokens.attend(states)[:, :-1], tokens[:, 1:])


def _umt5(model: Any, batch: Any) -> Any:
    tokens = batch["tokens"]
    mask = jnp.ones_like(tokens)
    states = model(input_ids=batch["source"], attention_mask=mask, decoder_input_ids=tokens)
    return _cross_entropy(model.lm_head(states)[:, :-1], tokens[:, 1:])


def _sam2(model: Any, batch: Any) -> Any:
    found = model.forward_image(batch["image"])["backbone_fpn"]
    return sum(jnp.mean(jnp.square(level.astype(jnp.float32))) for level in found)


def _features(model: Any, batch: Any) -> Any:
    return _distance(model(batch["image"])["pooler_output"], batch["target"])


CASES = {
    "ViT-L/16": Case(
        module="vit.modeling",
        full=lambda m: (
            lambda rngs: m.ViTClassificationModel(
                dataclasses.replace(
                    m.ModelConfig.vit_p16_224(), num_layers=24, num_heads=16, hidden_dim=1024, mlp_dim=4096
                ),
                rngs=rngs,
            )
        ),
        small=lambda m: (
            lambda rngs: m.ViTClassificationModel(
                dataclasses.replace(
                    m.ModelConfig.vit_p16_224(), num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64
                ),
                rngs=rngs,
            )
        ),
        row=_image(224),
        small_row=_image(224),
        rows=1024,
        loss=lambda model, batch: _classified(model, batch, rngs=None),
    ),
    "ConvNeXt-L": Case(
        module="convnext.modeling",
        full=lambda m: lambda rngs: m.ConvNeXt(m.ModelConfig.convnext_large_224(), rngs=rngs),
        small=lambda m: (
            lambda rngs: m.ConvNeXt(
                dataclasses.replace(
                    m.ModelConfig.convnext_tiny_224(), stage_depths=(2, 2, 3, 2), stage_dims=(8, 16, 32, 64)
                ),
                rngs=rngs,
            )
        ),
        row=_image(224),
        small_row=_image(64),
        rows=1024,
        loss=lambda model, batch: _classified(model, batch, rngs=jax.random.key(0), train=False),
    ),
    "ResNet-152": Case(
        module="resnet.modeling",
        full=lambda m: lambda rngs: m.ResNet(m.ModelConfig.resnet152(), rngs=rngs),
        small=lambda m: lambda rngs: m.ResNet(m.ModelConfig([1, 2, 2, 1], num_classes=1000), rngs=rngs),
        row=_image(224),
        small_row=_image(64),
        rows=1024,
        loss=_classified,
    ),
    "DenseNet-201": Case(
        module="densenet121.modeling",
        full=lambda m: lambda rngs: m.DenseNet(m.ModelConfig.densenet_201(), rngs=rngs),
        small=lambda m: (
            lambda rngs: m.DenseNet(
                dataclasses.replace(m.ModelConfig.densenet_121(), dense_block_layers=[2, 2, 2, 2]), rngs=rngs
            )
        ),
        row=_image(224),
        small_row=_image(64),
        rows=1024,
        loss=_classified,
    ),
    "EfficientNet-B7": Case(
        module="efficientnet.modeling",
        full=lambda m: lambda rngs: m.EfficientNet(m.ModelConfig.b7(), rngs=rngs),
        small=lambda m: lambda rngs: m.EfficientNet(m.ModelConfig.b0(), rngs=rngs),
        row=_image(600),
        small_row=_image(64),
        rows=512,
        loss=_classified,
    ),
    "VGG-19": Case(
        module="vgg19.modeling",
        full=lambda m: lambda rngs: m.VGG(m.ModelConfig.vgg_19(), rngs=rngs),
        small=lambda m: (
            lambda rngs: m.VGG(m.ModelConfig(1000, [1, 1, 1, 1, 1], [8, 8, 16, 16, 16, 32]), rngs=rngs)
        ),
        row=_image(224),
        small_row=_image(224),
        rows=1024,
        loss=_classified,
    ),
    "DINOv3-7B": Case(
        module="dinov3.modeling",
        full=lambda m: lambda rngs: m.Dinov3ViTModel(m.ModelConfig.dinov3_vit7b16(), rngs),
        small=lambda m: (
            lambda rngs: m.Dinov3ViTModel(
                dataclasses.replace(
                    m.ModelConfig.dinov3_vit7b16(),
                    hidden_size=64,
                    intermediate_size=128,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                ),
                rngs,
            )
        ),
        row={"image": (3, 224, 224, "bfloat16"), "target": (4096, "bfloat16")},
        small_row={"image": (3, 224, 224, "bfloat16"), "target": (64, "bfloat16")},
        rows=2048,
        loss=_features,
    ),
    "Mamba-2 2.7B": Case(
        module="mamba2.modeling",
        full=lambda m: (
            lambda rngs: m.Mamba2ForCausalLM(m.ModelConfig(hidden_size=2560, num_hidden_layers=64), rngs=rngs)
        ),
        small=lambda m: lambda rngs: m.Mamba2ForCausalLM(m.ModelConfig.tiny(), rngs=rngs),
        row={"tokens": (2048, "int32", 50280)},
        small_row={"tokens": (64, "int32", 1000)},
        rows=256,
        loss=lambda model, batch: model(batch["tokens"], labels=batch["tokens"])["loss"],
    ),
    "Qwen3-8B": Case(
        module="qwen3.modeling",
        full=lambda m: lambda rngs: m.Qwen3(m.ModelConfig.qwen3_8b(), rngs=rngs),
        small=lambda m: (
            lambda rngs: m.Qwen3(
                dataclasses.replace(
                    m.ModelConfig.qwen3_0_6b(),
                    num_layers=3,
                    vocab_size=256,
                    emb_dim=64,
                    mlp_dim=128,
                    num_heads=4,
                    num_kv_heads=2,
                    head_dim=16,
                ),
                rngs=rngs,
            )
        ),
        row={"tokens": (4096, "int32", 151936)},
        small_row={"tokens": (32, "int32", 256)},
        rows=256,
        loss=_qwen3,
    ),
    "Whisper large": Case(
        module="whisper.modeling",
        full=lambda m: (
            lambda rngs: m.Whisper(
                dataclasses.replace(
                    m.ModelConfig.whisper_tiny(),
                    d_model=1280,
                    encoder_layers=32,
                    decoder_layers=32,
                    encoder_attention_heads=20,
                    decoder_attention_heads=20,
                    encoder_ffn_dim=5120,
                    decoder_ffn_dim=5120,
                ),
                rngs=rngs,
            )
        ),
        small=lambda m: (
            lambda rngs: m.Whisper(
                dataclasses.replace(
                    m.ModelConfig.whisper_tiny(),
                    d_model=48,
                    encoder_layers=2,
                    decoder_layers=2,
                    encoder_ffn_dim=96,
                    decoder_ffn_dim=96,
                    max_source_positions=40,
                    vocab_size=256,
                ),
                rngs=rngs,
            )
        ),
        row={"sound": (3000, 80, "bfloat16"), "tokens": (448, "int32", 51865)},
        small_row={"sound": (80, 80, "bfloat16"), "tokens": (16, "int32", 256)},
        rows=512,
        loss=_whisper,
    ),
    "UMT5-XL": Case(
        module="umt5.modeling",
        full=lambda m: (
            lambda rngs: m.UMT5Model(
                m.ModelConfig(d_model=2048, d_ff=5120, num_layers=24, num_heads=32, d_kv=64), rngs=rngs
            )
        ),
        small=lambda m: (
            lambda rngs: m.UMT5Model(
                m.ModelConfig(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=256),
                rngs=rngs,
            )
        ),
        row={"source": (512, "int32", 250112), "tokens": (512, "int32", 250112)},
        small_row={"source": (16, "int32", 256), "tokens": (16, "int32", 256)},
        rows=512,
        loss=_umt5,
    ),
    "SAM-2 large (image encoder)": Case(
        module="sam2.modeling",
        full=lambda m: lambda rngs: m.build_sam2_model_from_config(m.ModelConfig.sam2_large(), rngs),
        small=lambda m: lambda rngs: m.build_sam2_model_from_config(m.ModelConfig.sam2_tiny(), rngs),
        row={"image": (1024, 1024, 3, "bfloat16")},
        small_row={"image": (256, 256, 3, "bfloat16")},
        rows=256,
        loss=_sam2,
    ),
    "VAE": Case(
        module="vae.modeling",
        full=lambda m: lambda rngs: m.VAE(m.ModelConfig.stable_diffusion_v1_5(), rngs),
        small=lambda m: (
            lambda rngs: m.VAE(
                dataclasses.replace(
                    m.ModelConfig.stable_diffusion_v1_5(),
                    block_out_channels=(32, 32, 32, 32),
                    norm_num_groups=4,
                ),
                rngs,
            )
        ),
        row={"image": (512, 512, 3, "bfloat16")},
        small_row={"image": (32, 32, 3, "bfloat16")},
        rows=256,
        loss=lambda model, batch: _distance(model(batch["image"]), batch["image"]),
    ),
}


def problem(case: Case, make: Callable[[nnx.Rngs], nnx.Module], dtype: Any) -> Problem:
    """Return what is planned of a model whose parameters are cast to `dtype` in the loss."""

    def made() -> Any:
        return nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)[1:]

    graph, *_ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)
    params, rest = jax.eval_shape(made)

    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def changing(params: Any, batch: Any, rest: Any) -> Any:
        model = nnx.merge(graph, jax.tree.map(cast, params), rest)
        value = case.loss(model, jax.tree.map(cast, batch))
        return value, ({}, nnx.split(model, nnx.Param, ...)[2])

    def still(params: Any, batch: Any) -> Any:
        return case.loss(nnx.merge(graph, jax.tree.map(cast, params), rest), jax.tree.map(cast, batch))

    if jax.tree.leaves(rest):
        return Problem(loss=changing, params=params, rest=rest, made=made)
    return Problem(loss=still, params=params, rest=None, made=made)


def loaded(case: Case) -> Any:
    """Return the module of a model, which can be made with the Flax that is here."""
    module = importlib.import_module(f"bonsai.models.{case.module}")
    make = case.full(module)
    nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    return module


def main() -> None:
    """Plan the models that are named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="a checkout of jax-ml/bonsai")
    parser.add_argument("names", nargs="*", choices=[*CASES, []], help="models, all by default")
    parser.add_argument("--values", action="store_true", help="also run small ones")
    asked = parser.parse_args()
    sys.path.insert(0, asked.folder)
    simulate(8)
    for name in asked.names or CASES:
        case = CASES[name]
        try:
            module = loaded(case)
        # A package that is missing, or a version of Flax that the model was not written for.
        except (ImportError, ValueError) as error:
            print(f"{name}: not tried, {str(error).partition(chr(10))[0]}")
            continue
        what = f"{name}, {case.rows} of {case.row}"
        for line in planned(
            what, problem(case, case.full(module), jnp.bfloat16), shapes(case.row, case.rows)
        ):
            print(line, flush=True)
        if asked.values:
            small = problem(case, case.small(module), jnp.float32)
            print(compared(small, drawn(case.small_row, 8)), flush=True)


if __name__ == "__main__":
    main()
