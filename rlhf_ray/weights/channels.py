"""From the configuration to the channel."""

from __future__ import annotations

from rlhf_ray.config.rollout import RolloutConfig
from rlhf_ray.weights.channel import WeightChannel
from rlhf_ray.weights.native import NativeChannel
from rlhf_ray.weights.object_store import ObjectStoreChannel


def make_channel(config: RolloutConfig) -> WeightChannel:
    """The channel of `config.weights.kind`."""
    if config.weights.kind == "object_store":
        return ObjectStoreChannel(config.weights)
    return NativeChannel(config)
