"""Reward functions that come with the package; use them as `rlhf_ray.rewards.<module>:<function>`."""
