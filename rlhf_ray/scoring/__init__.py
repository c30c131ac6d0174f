"""Reward and reference roles: frozen models and Python functions that look at finished rollouts."""
