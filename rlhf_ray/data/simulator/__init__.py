"""A simulated task with a known ground truth: customers, answers, annotators, and the hidden utility behind their choices.

After AlpacaFarm (arXiv 2305.14387). Training sees only the labels. Evaluation may use `utility`, the true value of an answer,
and `pair_accuracy_ceiling`, the best possible accuracy on the labels.
"""

from rlhf_ray.data.simulator.annotators import (
    PANEL,
    Annotator,
    draw_panel,
    pair_accuracy_ceiling,
    population_preference,
)
from rlhf_ray.data.simulator.generate import SimulatedData, Sizes, simulate
from rlhf_ray.data.simulator.hidden_utility import Features, Utility, features, utility, utility_reward

__all__ = [
    "PANEL",
    "Annotator",
    "Features",
    "SimulatedData",
    "Sizes",
    "Utility",
    "draw_panel",
    "features",
    "pair_accuracy_ceiling",
    "population_preference",
    "simulate",
    "utility",
    "utility_reward",
]
