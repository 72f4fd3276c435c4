"""What a model is to everything else: four functions and the names of its parameters' dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..sharding.errors import wrong

if TYPE_CHECKING:
    import jax

Params: TypeAlias = Mapping[str, Any]
Batch: TypeAlias = "Mapping[str, jax.Array]"


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A language model written once, without a word about devices.

    Every function is pure and can be traced with abstract arrays, so `jax.eval_shape(model.init, key)`
    costs no memory and `jax.jit(model.init, out_shardings=...)` creates each parameter in shards.

    A batch is a dictionary of int32 arrays ``[batch, sequence]``: `tokens`, `targets` (-1 is not counted)
    and, where rows hold several documents, `segment_ids` (0 is padding) and `positions` (from 0 in each
    document). Without `segment_ids` a row is one document.
    """

    config: Any
    """What the model was built from."""

    init: Callable[[jax.Array], Params]
    """``init(key) -> params``: a nested dictionary of arrays; the values depend on the key alone."""

    loss: Callable[[Params, Batch], tuple[jax.Array, dict[str, jax.Array]]]
    """``loss(params, batch)``: mean float32 loss over counted targets, in nats, and an auxiliary dictionary
    whose ``"weight"`` is the number of counted targets (float32)."""

    logits: Callable[..., jax.Array]
    """``logits(params, tokens, segment_ids=None, positions=None)`` → float32 ``[batch, sequence, vocab]``.

    Here as in `decode`, `params` is ``(params, state)`` where the model has a state: what `init` gives."""

    names: Mapping[str, Any] | None
    """Parallel to the parameters: a tuple of named dimensions for each array; None where they have none."""

    num_parameters: int
    """Scalars in all parameters."""

    flops_per_token: Callable[[int], float]
    """``flops_per_token(sequence)``: floating-point operations of one training step per token, forward and
    backward, without recomputation, and with only the visible half of causal attention counted."""

    trainable: Any = None
    """Which parameters are trained, as in `meshwright.sharding.plan`; all of them if None."""

    has_state: bool = False
    """Whether something changes beside the parameters: `init` then gives ``(params, state)``, and the loss is
    ``loss(params, batch, state)`` and gives ``(loss, (aux, new state))``."""

    evaluation: Callable[..., Any] | None = None
    """The loss that held-out batches are judged by, of the same arguments, to ``(loss, aux)``; None if it is
    `loss`. Of use where training drops values out or takes the statistics of its own batch."""

    empty_cache: Callable[[int, int], Any] | None = None
    """``empty_cache(batch, length)``: keys and values of no token yet; None if the model cannot decode."""

    decode: Callable[..., tuple[jax.Array, Any]] | None = None
    """``decode(params, cache, tokens, index)``: feed tokens ``[batch]`` at place `index`; returns logits of
    the token after it, float32 ``[batch, vocab]``, and the cache with this token in it."""

    def __post_init__(self) -> None:
        for name in ("init", "loss", "logits", "flops_per_token"):
            if not callable(getattr(self, name)):
                raise wrong(name, getattr(self, name), "is no function")
        for name in ("evaluation", "empty_cache", "decode"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise wrong(name, getattr(self, name), "is neither a function nor None")
        if isinstance(self.num_parameters, bool) or not isinstance(self.num_parameters, int):
            raise wrong("num_parameters", self.num_parameters, "is no whole number")
