"""What shapes a batch beside rewards and losses: long responses, groups without signal, demonstrations."""

from __future__ import annotations

from pydantic import Field

from rlhf_ray.config.section import Section


class OverlongConfig(Section):
    """DAPO's soft punishment of long responses (arXiv 2503.14476): linear over the last `buffer_tokens` of the limit."""

    buffer_tokens: int = Field(ge=1)
    """The last so many tokens below `rollout.sampling.max_new_tokens` cost, in proportion."""
    penalty: float = Field(1.0, gt=0)
    """What a response of the limit's length loses of its score."""


class DynamicSamplingConfig(Section):
    """DAPO's dynamic sampling (arXiv 2503.14476): groups whose scores are all equal have no gradient and are replaced."""

    max_attempts: int = Field(3, ge=2)
    """At most so many times a batch's groups are generated for one batch; what comes after is trained as it is."""


class PtxConfig(Section):
    """PPO-ptx (InstructGPT, arXiv 2203.02155, equation 2): the policy goes on learning from `data.demonstrations`."""

    coefficient: float = Field(27.8, gt=0)
    """γ: weight of the demonstrations' cross-entropy, in nats per token, beside the policy loss."""
    share: float = Field(1.0, gt=0)
    """Demonstrations of each optimizer step, per rollout of it."""
