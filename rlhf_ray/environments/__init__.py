"""Episodes of several turns: the policy speaks, an environment answers, and all of it is one rollout.

A new environment is a class with `reset` and `step` (`base.Environment`), named in `ppo.environment.class`; nothing else needs
to know of it.
"""

from rlhf_ray.environments.base import Environment, EnvironmentFailed, Step

__all__ = ["Environment", "EnvironmentFailed", "Step"]
