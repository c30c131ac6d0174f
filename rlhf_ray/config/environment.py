"""Episodes of several turns: which environment answers the policy, and for how long."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator

from rlhf_ray.config.section import Section


class EnvironmentConfig(Section):
    """Who answers the policy between its turns (`rlhf_ray.environments`); without this section a rollout is one response."""

    # The key is a word that Python keeps for itself; what is written down must be read back.
    model_config = ConfigDict(serialize_by_alias=True)

    factory: str = Field(alias="class")
    """`package.module:Class` with `reset` and `step`, importable where the run is started; one object for each episode."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the class."""
    max_turns: int = Field(4, ge=1)
    """Most turns of the policy in one episode; each may have `rollout.sampling.max_new_tokens`."""
    max_observation_tokens: int = Field(64, ge=1)
    """Longest answer of the environment, in tokens, with what the chat template puts around it; a longer one is an error."""
    concurrency: int = Field(64, ge=1)
    """Calls of `reset` and `step` at a time, each in a thread of its own."""
    timeout_s: float = Field(60.0, gt=0)
    """Longest time for one of them."""
    on_error: Literal["fail", "drop"] = "fail"
    """An environment that raises, is too slow or answers what cannot be used ends the run, or its group is dropped, recorded."""

    @field_validator("factory")
    @classmethod
    def _module_and_class(cls, value: str) -> str:
        module, _, name = value.partition(":")
        if not module or not name:
            raise ValueError(f"{value!r} is not of the form package.module:Class")
        return value
