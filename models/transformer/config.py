"""The shape and the options of a decoder, as a record that checks itself."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from ...sharding.errors import UserError, nearest, nearest_divisors

Activation = Literal["swiglu", "geglu", "gelu"]
Bias = Literal["none", "qkv", "all"]
Norm = Literal["rms", "layer"]
Positions = Literal["rope", "learned"]
RopeScaling = Literal["none", "linear", "llama3"]
DType = Literal["float32", "bfloat16", "float16"]

_CHOICES = {
    "activation": get_args(Activation),
    "bias": get_args(Bias),
    "norm": get_args(Norm),
    "position_embedding": get_args(Positions),
    "rope_scaling": get_args(RopeScaling),
    "compute_dtype": get_args(DType),
    "param_dtype": get_args(DType),
}
_COUNTS = ("layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab", "max_sequence")
_OPTIONAL_COUNTS = ("window", "global_every", "attention_chunk", "loss_chunk")
_POSITIVE = ("norm_epsilon", "rope_theta", "rope_factor")
_OPTIONAL_POSITIVE = ("rope_local_theta", "attention_soft_cap", "final_soft_cap", "query_scale")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything that decides a decoder's parameters and its arithmetic.

    Raises `UserError` for a shape that cannot work: heads that are no multiple of kv_heads, an odd head_dim
    under rotary positions, an option without the option it depends on.
    """

    layers: int
    embed: int
    heads: int
    kv_heads: int
    """Fewer than `heads` is grouped-query attention; 1 is multi-query attention."""
    head_dim: int
    mlp: int
    vocab: int
    max_sequence: int
    """Tokens of context the model is meant for; a hard limit only with learned positions."""

    activation: Activation = "swiglu"
    """`swiglu` and `geglu` have a gate projection, `gelu` has none; both GELUs are the tanh approximation."""
    bias: Bias = "none"
    """Which projections add a bias: none, queries with keys and values, or all of them."""
    tied_embeddings: bool = False
    """The output projection is the embedding table."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(embed), as Gemma does."""

    norm: Norm = "rms"
    norm_epsilon: float = 1e-5
    norm_offset: bool = False
    """Scale by 1 + parameter instead of by the parameter, as Gemma does (RMSNorm only)."""
    post_norms: bool = False
    """Normalise also what attention and MLP return, before it is added back."""
    qk_norm: bool = False
    """RMSNorm over head_dim of queries and keys, before rotary positions."""

    position_embedding: Positions = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = "none"
    rope_factor: float = 1.0
    """How many times longer than trained the context is (`linear` and `llama3` scaling)."""
    rope_low_frequency_factor: float = 1.0
    rope_high_frequency_factor: float = 4.0
    rope_original_sequence: int = 8192
    """The context before `llama3` scaling."""
    rope_local_theta: float | None = None
    """Theta of sliding-window layers, unscaled; None uses `rope_theta` in every layer."""

    window: int | None = None
    """A token sees itself and the window - 1 tokens before it; None sees all before it."""
    global_every: int | None = None
    """Every n-th layer ignores the window (6: five local layers, then a global one)."""
    query_scale: float | None = None
    """Multiplies queries; None is head_dim ** -0.5."""
    attention_soft_cap: float | None = None
    """Scores become cap * tanh(score / cap)."""
    final_soft_cap: float | None = None
    """The same for logits."""

    z_loss: float = 0.0
    """Weight of the squared log-partition added to the loss."""
    compute_dtype: DType = "bfloat16"
    """Of matrix products; norms, softmax and the loss are float32."""
    param_dtype: DType = "float32"
    attention_chunk: int | None = None
    """Queries scored at a time; None decides by length (see `attention.query_chunk`)."""
    loss_chunk: int | None = None
    """Positions of each row whose logits exist at a time; None decides by size (see `loss.logits_chunk`)."""

    def __post_init__(self) -> None:
        """Check each field, then the fields against each other."""
        _check_values(self)
        _check_heads(self)
        _check_options(self)


def checked_fields(names: object) -> None:
    """Refuse a name that is no field of `DecoderConfig`, naming the nearest."""
    known = [field.name for field in fields(DecoderConfig)]
    for name in names if isinstance(names, (list, dict, tuple)) else ():
        if name not in known:
            raise UserError(f"a decoder has no field {name!r}; {nearest(name, known)}")


def _check_values(config: DecoderConfig) -> None:
    for name in (*_COUNTS, *_OPTIONAL_COUNTS):
        value = getattr(config, name)
        if value is None and name in _OPTIONAL_COUNTS:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name}={value!r} must be a whole number of at least 1")
    for name in (*_POSITIVE, *_OPTIONAL_POSITIVE):
        value = getattr(config, name)
        if value is None and name in _OPTIONAL_POSITIVE:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise UserError(f"{name}={value!r} must be a number above 0")
    for name, choices in _CHOICES.items():
        if (value := getattr(config, name)) not in choices:
            raise UserError(f"{name}={value!r} is not known; {nearest(str(value), choices)}")
    if not isinstance(config.z_loss, (int, float)) or config.z_loss < 0:
        raise UserError(f"z_loss={config.z_loss!r} must be a number of at least 0")


def _check_heads(config: DecoderConfig) -> None:
    if config.heads % config.kv_heads:
        raise UserError(
            f"kv_heads={config.kv_heads} does not divide heads={config.heads}; "
            f"nearest: {nearest_divisors(config.heads, config.kv_heads)}"
        )
    if config.position_embedding == "rope" and config.head_dim % 2:
        raise UserError(
            f"head_dim={config.head_dim} is odd, rotary positions turn pairs; "
            f"nearest: {config.head_dim - 1 or 2} or {config.head_dim + 1}"
        )


def _check_options(config: DecoderConfig) -> None:
    if config.global_every is not None and config.window is None:
        raise UserError(f"global_every={config.global_every} has no effect without a window; set window")
    if config.rope_local_theta is not None and config.global_every is None:
        raise UserError(
            f"rope_local_theta={config.rope_local_theta} has no effect without global_every; "
            "set global_every, or rope_theta alone"
        )
    if config.norm == "layer" and config.norm_offset:
        raise UserError("norm_offset=true applies to norm='rms' only, not to norm='layer'")
    if config.position_embedding == "learned" and config.rope_scaling != "none":
        raise UserError(f"rope_scaling={config.rope_scaling!r} has no effect with learned positions")
    if config.rope_scaling == "none" and config.rope_factor != 1.0:
        raise UserError(
            f"rope_factor={config.rope_factor} has no effect with rope_scaling='none'; known: linear, llama3"
        )
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    if config.rope_scaling == "llama3" and not 0 < low < high:
        raise UserError(
            f"rope_low_frequency_factor={low} must be above 0 and below rope_high_frequency_factor={high}"
        )
