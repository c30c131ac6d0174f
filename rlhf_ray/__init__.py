"""Distributed RLHF training on Ray. Entry points: the command `rlhf-ray` and `rlhf_ray.stages`."""

import gc

# torch, transformers and vLLM make a million objects that never die. With Python's own threshold, 700, looking through them again
# and again takes 15 % of the CPU time in which the actors of a small run start.
gc.set_threshold(10_000, 10, 10)
