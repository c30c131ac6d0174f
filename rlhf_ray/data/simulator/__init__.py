"""A simulated task with a known truth: customers, answers, annotators, and the hidden utility behind their choices.

After AlpacaFarm (arXiv 2305.14387). Whoever trains on its labels sees only labels; whoever evaluates may ask `utility`
what an answer is really worth, and `pair_accuracy_ceiling` how well the labels could be predicted at all.
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
