"""Small models of many kinds, written as anyone would write them: no annotation, no sharding.

Each is a function of a `scale` that multiplies widths and returns a `Case`. Batches are of 8 examples and
most widths are multiples of 8, so that every case can be run on 8 simulated devices.
"""

from __future__ import annotations

from collections.abc import Callable

from zoo.case import Case
from zoo.graphs import graph_net
from zoo.mixtures import mixture_of_experts
from zoo.plain import contrastive, mlp
from zoo.recurrent import lstm, state_space
from zoo.transformers import decoder, encoder_decoder, vision_transformer
from zoo.vision import resnet, unet

MODELS: dict[str, Callable[..., Case]] = {
    "decoder": decoder,
    "encoder_decoder": encoder_decoder,
    "vision_transformer": vision_transformer,
    "resnet": resnet,
    "mixture_of_experts": mixture_of_experts,
    "state_space": state_space,
    "graph_net": graph_net,
    "lstm": lstm,
    "mlp": mlp,
    "unet": unet,
}

__all__ = ["MODELS", "Case", "contrastive", *MODELS]
