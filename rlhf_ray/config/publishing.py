"""When a run gives a new version of its policy to an endpoint by itself."""

from __future__ import annotations

from pydantic import Field

from rlhf_ray.config.section import Section


class PublishingConfig(Section):
    """New versions for a running endpoint (`rlhf-ray serve --address`), while training goes on."""

    endpoint: str = "policy"
    """Name of the endpoint. It runs on the cluster of the run."""
    every: int = Field(10, ge=1)
    """Steps between two evaluations; each of them may publish."""
    prompts: int = Field(64, ge=8)
    """Held-out prompts that every candidate answers once; all where there are fewer."""
    better_than: float = Field(0.5, ge=0, lt=1)
    """A policy is published when the lower end of the 95 % interval of its win rate against the one that was published last, or
    against the one that this run began with, is above this. Won is what `evaluation.utility` prefers, or else the reward."""
    kl_limit: float | None = Field(None, gt=0)
    """Nats per response: a policy that is further from the reference is not published, whatever its reward; null: no limit."""
    share: float = Field(1.0, gt=0, le=1)
    """Of the traffic that a new version gets. Below 1 it is a canary until somebody says `rlhf-ray promote`, or a better one
    takes its place."""
