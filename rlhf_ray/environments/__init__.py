"""Episodes of several turns: an environment answers the policy's turns, and the whole episode is one rollout.

A new environment is a class with `reset` and `step` (`base.Environment`), named in `ppo.environment.class`; nothing else has to
be changed.
"""

from rlhf_ray.environments.base import Environment, EnvironmentFailed, Step

__all__ = ["Environment", "EnvironmentFailed", "Step"]
