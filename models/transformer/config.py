"""The shape and the options of a decoder, those of published models by name, and the arithmetic of a step."""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ...sharding.errors import UserError, nearest, nearest_divisors

Activation = Literal["swiglu", "geglu", "gelu"]
Bias = Literal["none", "qkv", "all"]
Norm = Literal["rms", "layer"]
Positions = Literal["rope", "learned"]
RopeScaling = Literal["none", "linear", "llama3"]
Router = Literal["softmax", "sigmoid"]
DType = Literal["float32", "bfloat16", "float16"]

# Facts about a preset that are not fields of the config.
_FACTS = ("source", "parameters", "learning_rate")


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

    experts: int | None = None
    """Experts in place of each layer's MLP; a token goes to `experts_per_token` of them. None: no mixture."""
    experts_per_token: int | None = None
    expert_mlp: int | None = None
    """Hidden size of one expert."""
    shared_experts: int | None = None
    """Experts that every token goes to besides, as one MLP so many times as wide."""
    dense_layers: int | None = None
    """The first layers, of all `layers`, that have an MLP of size `mlp` all the same."""
    router: Router = "softmax"
    """How experts are scored; the weights of the chosen ones add up to `router_scale`."""
    router_scale: float = 1.0
    router_groups: int | None = None
    """Groups that the experts form, in order; a token's choices come from `router_groups_per_token` of them,
    those whose two best experts suit it best."""
    router_groups_per_token: int | None = None
    router_bias_rate: float | None = None
    """How far a step moves each expert's bias in the choice against its load; None: there is no bias."""
    balance_loss: float | None = None
    """Weight of the mean over rows and layers of a row's balance loss, 1 where experts are chosen alike."""
    expert_capacity: float | None = None
    """Tokens of a row that an expert takes, over its even share, for static shapes; None drops no token."""

    kv_rank: int | None = None
    """Latent attention: size of what keys and values are made from; None is plain attention."""
    query_rank: int | None = None
    """Size of what queries are made from; None makes them from the stream."""
    rope_head_dim: int | None = None
    """Part of a latent head that rotary positions turn, besides `head_dim`."""
    value_head_dim: int | None = None

    z_loss: float = 0.0
    """Weight of the squared log-partition added to the loss."""
    compute_dtype: DType = "bfloat16"
    """Of matrix products; norms, softmax and the loss are float32."""
    param_dtype: DType = "float32"
    attention_chunk: int | None = None
    """Queries scored at a time; None decides by length (see `sharding.ops.calls.query_chunk`)."""
    loss_chunk: int | None = None
    """Positions of each row whose logits exist at a time; None decides by size (see `loss.logits_chunk`)."""

    def __post_init__(self) -> None:
        """Check each field, then the fields against each other."""
        _check_values(self)
        _check_heads(self)
        _check_options(self)
        _check_experts(self)
        _check_latent(self)


@functools.cache
def _kinds() -> dict[str, tuple[Any, bool]]:
    """Return the type of each field without None, and whether it may be None."""
    found = {}
    for name, hint in get_type_hints(DecoderConfig).items():
        optional = type(None) in get_args(hint)
        found[name] = (get_args(hint)[0] if optional else hint, optional)
    return found


def _check_values(config: DecoderConfig) -> None:
    """Refuse values that are not of their field's type: whole numbers are counts, others above 0."""
    for name, (kind, optional) in _kinds().items():
        value = getattr(config, name)
        if optional and value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise UserError(f"{name}={value!r} is not known; {nearest(str(value), get_args(kind))}")
        elif kind is bool:
            if not isinstance(value, bool):
                raise UserError(f"{name}={value!r} must be true or false")
        elif kind is int:
            if not number or not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={value!r} must be a whole number of at least 1")
        elif name == "z_loss":
            if not number or value < 0:
                raise UserError(f"z_loss={value!r} must be a number of at least 0")
        elif not number or not 0 < value < math.inf:
            raise UserError(f"{name}={value!r} must be a number above 0")


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


_OF_EXPERTS = (
    *("shared_experts", "dense_layers", "router_groups", "router_groups_per_token"),
    *("router_bias_rate", "balance_loss"),
)


def _check_experts(config: DecoderConfig) -> None:
    given = {name: getattr(config, name) for name in ("experts_per_token", "expert_mlp")}
    if config.experts is None:
        more = {name: getattr(config, name) for name in _OF_EXPERTS}
        for name, value in (given | more).items():
            if value is not None:
                raise UserError(f"{name}={value} has no effect without experts; set experts")
        return
    for name, value in given.items():
        if value is None:
            raise UserError(f"experts={config.experts} needs {name} too")
    if config.experts_per_token > config.experts:  # type: ignore[operator]
        raise UserError(
            f"experts_per_token={config.experts_per_token} is more than experts={config.experts}; "
            f"nearest: {config.experts}"
        )
    if (config.dense_layers or 0) >= config.layers:
        raise UserError(
            f"dense_layers={config.dense_layers} leaves none of layers={config.layers} to the experts; "
            f"nearest: {config.layers - 1}"
        )
    _check_groups(config)
    if config.bias == "all":
        raise UserError("bias='all' is not there for experts; known: none, qkv")
    if config.dense_layers and config.global_every is not None:
        raise UserError(f"dense_layers={config.dense_layers} does not go with global_every")


def _check_groups(config: DecoderConfig) -> None:
    groups, taken = config.router_groups, config.router_groups_per_token
    if (groups is None) != (taken is None):
        given = "router_groups" if taken is None else "router_groups_per_token"
        raise UserError(f"{given}={getattr(config, given)} needs router_groups and router_groups_per_token")
    if groups is None or taken is None:
        return
    experts, choices = config.experts or 1, config.experts_per_token or 1
    if experts % groups:
        raise UserError(
            f"router_groups={groups} does not divide experts={experts}; "
            f"nearest: {nearest_divisors(experts, groups)}"
        )
    if taken > groups:
        raise UserError(
            f"router_groups_per_token={taken} is more than router_groups={groups}; nearest: {groups}"
        )
    if (offered := taken * (experts // groups)) < choices:
        raise UserError(
            f"router_groups_per_token={taken} of {groups} groups have {offered} experts, fewer than "
            f"experts_per_token={choices}; nearest: {-(-choices * groups // experts)}"
        )


def _check_latent(config: DecoderConfig) -> None:
    given = {name: getattr(config, name) for name in ("query_rank", "rope_head_dim", "value_head_dim")}
    if config.kv_rank is None:
        for name, value in given.items():
            if value is not None:
                raise UserError(f"{name}={value} has no effect without kv_rank; set kv_rank")
        return
    for name in ("rope_head_dim", "value_head_dim"):
        if given[name] is None:
            raise UserError(f"kv_rank={config.kv_rank} needs {name} too")
    if config.rope_head_dim % 2:  # type: ignore[operator]
        raise UserError(
            f"rope_head_dim={config.rope_head_dim} is odd, rotary positions turn pairs; "
            f"nearest: {config.rope_head_dim + 1}"  # type: ignore[operator]
        )
    if config.kv_heads != config.heads:
        raise UserError(
            f"kv_heads={config.kv_heads} has no meaning in latent attention; write {config.heads}"
        )
    if config.position_embedding != "rope" or config.qk_norm or config.bias != "none":
        raise UserError(
            "latent attention goes with position_embedding='rope', qk_norm=false and bias='none' only"
        )


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads((Path(__file__).parents[1] / "presets.toml").read_text("utf-8"))


def presets() -> list[str]:
    """Return the names that `preset` knows.

    >>> presets()[:3]
    ['tiny', 'gpt-125m', 'llama2-7b']
    """
    return list(_table())


def preset_facts(name: str) -> dict[str, Any]:
    """Return what is known of a preset beyond its config: `source`, published `parameters`, `learning_rate`.

    Raises `UserError` for an unknown name.

    >>> preset_facts("llama3-8b")["parameters"]
    8030261248
    """
    return {key: value for key, value in _row(name).items() if key in _FACTS}


def preset(name: str, **overrides: Any) -> DecoderConfig:
    """Return the config of a published model, with any field replaced.

    Raises `UserError` for an unknown name or field, naming the nearest, and for fields that do not fit.

    >>> preset("llama3-8b", layers=2).layers
    2
    """
    check_fields(overrides)
    row = {key: value for key, value in _row(name).items() if key not in _FACTS}
    return DecoderConfig(**(row | overrides))


def check_fields(names: Iterable[str]) -> None:
    """Raise UserError, naming the nearest, for a name that is no field of a decoder's config."""
    known = [field.name for field in fields(DecoderConfig)]
    for name in names:
        if name not in known:
            raise UserError(f"a decoder has no field {name!r}; {nearest(name, known)}")


def _row(name: str) -> dict[str, Any]:
    table = _table()
    if name not in table:
        raise UserError(f"there is no preset {name!r}; {nearest(name, table)}")
    return table[name]


def matmul_parameters(config: DecoderConfig) -> int:
    """Return the scalars that a token is multiplied with: matrices but the look-up, of experts its own."""
    matrices = 2 if config.activation == "gelu" else 3
    dense = config.layers if config.experts is None else config.dense_layers or 0
    mlps = dense * matrices * config.embed * config.mlp
    if config.experts is not None:
        each = ((config.experts_per_token or 0) + (config.shared_experts or 0)) * (config.expert_mlp or 0)
        mlps += (config.layers - dense) * config.embed * (matrices * each + config.experts)
    return config.layers * _attention_parameters(config) + mlps + config.embed * config.vocab


def _attention_parameters(config: DecoderConfig) -> int:
    embed, heads = config.embed, config.heads
    if config.kv_rank is None:
        return 2 * embed * (heads + config.kv_heads) * config.head_dim
    turned, value = config.rope_head_dim or 0, config.value_head_dim or 0
    width = embed if config.query_rank is None else config.query_rank
    query = width * heads * (config.head_dim + turned) + (0 if width == embed else embed * width)
    latent = embed * (config.kv_rank + turned) + config.kv_rank * heads * (config.head_dim + value)
    return query + latent + heads * value * embed


def visible_keys(config: DecoderConfig, sequence: int) -> float:
    """Return the mean number of keys a query sees in one row that is one document, summed over layers.

    Half the sequence where attention is only causal; window · (1 - window / (2 · sequence)) inside a window.
    """
    window = min(config.window or sequence, sequence)
    local = window * (1.0 - window / (2.0 * sequence))
    global_layers = config.layers // config.global_every if config.global_every else 0
    return (config.layers - global_layers) * local + global_layers * sequence / 2.0


def flops_per_token(config: DecoderConfig, sequence: int) -> float:
    """Return floating-point operations of forward and backward per token, a multiply-add being two.

    Six for each matrix parameter (two forward, four backward; PaLM appendix B, arXiv:2204.02311) and
    6 · heads · (size of a query + size of a value) for each visible key. What remat computes again, norms and
    softmax are not counted.
    """
    query = config.head_dim + (config.rope_head_dim or 0)
    value = config.value_head_dim or config.head_dim
    attention = 6.0 * config.heads * (query + value) * visible_keys(config, sequence)
    return 6.0 * matmul_parameters(config) + attention
