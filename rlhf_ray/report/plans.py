"""Which charts a report has, in the order in which a person asks. What they show is the catalogue's (`telemetry.names`)."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.telemetry.names import FAULTS


@dataclass(frozen=True)
class Plan:
    """One chart."""

    title: str
    names: tuple[str, ...]
    """Metrics; one that ends in `*` stands for all names with that beginning."""
    without: tuple[str, ...] = ()
    """Of those, what another chart shows."""


Question = tuple[str, str, tuple[Plan, ...]]
"""A section's title, what it is for, and its charts."""

PPO: tuple[Question, ...] = (
    ("What it learns", "What the policy is paid for, and how far it moves away from where it began.", (
        Plan("Reward", ("reward/mean", "reward/shaped_mean")),
        Plan("KL to the reference", ("kl/sequence",)),
        Plan("KL coefficient", ("kl/coefficient",)),
        Plan("Response length", ("response/length_mean", "response/length_max")),
        Plan("Responses that end themselves", ("response/eos_rate",)),
        Plan("Entropy", ("policy/entropy",)),
        Plan("Reward by source", ("reward/part/*",)),
        Plan("Discriminator: told apart", ("discriminator/accuracy", "discriminator/accuracy_demonstrations")),
        Plan("Discriminator: score gap", ("discriminator/score_gap",)),
    )),
    ("How it learns", "Whether the updates are sound: small steps, a critic that explains, gradients in bounds.", (
        Plan("Policy loss", ("policy/loss",)),
        Plan("Value loss", ("value/loss",)),
        Plan("Clip fraction", ("policy/clip_fraction", "value/clip_fraction")),
        Plan("KL of an update", ("policy/approx_kl",)),
        Plan("Value: explained variance", ("value/explained_variance",)),
        Plan("Values and returns", ("value/mean", "return/mean")),
        Plan("Probability ratio", ("policy/ratio_mean", "policy/ratio_max")),
        Plan("Gradient norm", ("policy/grad_norm", "value/grad_norm")),
        Plan("Learning rate", ("policy/learning_rate", "value/learning_rate")),
    )),
    ("How it runs", "Whether engine and learner agree, where the time goes, and what failed on the way.", (
        Plan("Engine against learner, |Δ logp|", ("engine/logprob_difference_mean", "engine/logprob_difference_max")),
        Plan("Staleness", ("staleness/mean", "staleness/max")),
        Plan("Samples per second", ("throughput/samples_per_s",)),
        Plan("Tokens per second", ("throughput/*",), without=("throughput/samples_per_s",)),
        Plan("Idle share", ("idle/*",)),
        Plan("Faults so far", (FAULTS.name,)),
    )),
)  # fmt: skip
TIME: Question = ("Where the time goes", "Wall time of a step, and of it the time in which each phase was active.", (
    Plan("Time per step", ("time/*",)),
))  # fmt: skip
"""For several runs; of one run the phases are stacked."""
SFT: Question = ("Fine-tuning", "The base model learns to answer from demonstrations.", (
    Plan("Loss", ("loss", "heldout/loss")),
    Plan("Learning rate", ("learning_rate",)),
    Plan("Gradient norm", ("grad_norm",)),
))  # fmt: skip
REWARD_MODEL: Question = ("Reward model", "A model learns from choices between answers which one people prefer.", (
    Plan("Loss", ("loss", "heldout/loss")),
    Plan("Pairs ordered rightly", ("accuracy", "heldout/accuracy")),
    Plan("Learning rate", ("learning_rate",)),
))  # fmt: skip
