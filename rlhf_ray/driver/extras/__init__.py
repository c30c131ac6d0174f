"""Hooks of the PPO loop that a config asks for."""
