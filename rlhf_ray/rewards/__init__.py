"""Rewards: sources (reward models, functions, judges, HTTP services), the actors that compute them, and reward functions.

Configs name a reward function of this package as `rlhf_ray.rewards.<module>:<function>`.
"""
