"""The catalogue of metrics: one name for each figure, wherever it appears.

A name is `<subject>/<figure>`; seconds end in `_s`, rates in `_per_s`. In metrics.jsonl and in TensorBoard it stands
as it is. As a Ray gauge it is `rlhf_` and the name with every character outside [a-zA-Z0-9_] replaced by `_`, with
the tags `run` and `stage`; Ray exports a gauge to Prometheus with `ray_` before it, so `reward/mean` is
`ray_rlhf_reward_mean` there. Figures outside the catalogue are recorded like any other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What a name means."""

    name: str
    label: str
    """Short, for a person."""
    unit: str
    """Empty for a pure number; `%` marks a share between 0 and 1 that is shown in per cent."""
    description: str


_ROWS = (
    ("reward/mean", "reward", "", "mean score of the batch's responses, before any KL term"),
    ("reward/std", "reward, std", "", "standard deviation of the scores over the batch"),
    ("reward/shaped_mean", "reward − β·KL", "", "mean score minus the KL penalty: what the policy maximises"),
    ("kl/sequence", "KL", "nats", "KL to the reference per response: k1 summed over tokens, mean over the batch"),
    ("kl/coefficient", "β", "", "KL coefficient"),
    ("response/length_mean", "length", "tokens", "mean response length, the end-of-sequence token included"),
    ("response/length_max", "longest", "tokens", "longest response of the batch"),
    ("response/turns_mean", "turns", "", "mean number of the policy's turns in an episode"),
    ("response/eos_rate", "EOS rate", "%", "share of responses that the policy ended itself"),
    ("policy/entropy", "entropy", "nats", "mean entropy of the policy over response tokens"),
    ("policy/loss", "policy loss", "", "clipped surrogate loss"),
    ("policy/approx_kl", "approx. KL", "nats", "k3 estimate per token between the policy before and after the update"),
    ("policy/clip_fraction", "policy", "%", "share of tokens whose probability ratio was clipped"),
    ("policy/ratio_mean", "ratio, mean", "", "mean probability ratio of new to old policy"),
    ("policy/ratio_variance", "ratio, variance", "", "variance of the probability ratio over tokens"),
    ("policy/ratio_max", "ratio, max", "", "largest probability ratio of the step"),
    ("policy/correction_mean", "correction", "", "mean importance weight of a token, learner against what sampled it"),
    ("policy/ptx_loss", "PTX loss", "nats", "cross-entropy of the demonstrations' tokens in the policy's steps"),
    ("discriminator/loss", "discriminator loss", "nats", "binary cross-entropy of the batch, before learning from it"),
    (
        "discriminator/accuracy",
        "both sides",
        "%",
        "share told apart, samples and demonstrations counting half each, before learning from the batch",
    ),
    ("discriminator/accuracy_demonstrations", "demonstrations", "%", "share of demonstrations taken for what they are"),
    ("discriminator/score_gap", "score gap", "nats", "mean log D − log(1 − D) of demonstrations less that of samples"),
    ("discriminator/trusted", "trusted", "%", "1 where the discriminator was accurate enough to reward the batch"),
    ("discriminator/skipped", "updates skipped", "%", "share of its updates left out because it was accurate enough"),
    ("discriminator/grad_norm", "discriminator", "", "gradient norm of the discriminator before clipping"),
    ("discriminator/learning_rate", "discriminator", "", "learning rate of the discriminator"),
    (
        "teacher/kl",
        "KL to teacher",
        "nats",
        "KL(policy‖teacher) per token: of the sampled tokens, or exact over the vocabulary",
    ),
    (
        "sampling/groups_dropped",
        "groups dropped",
        "groups",
        "groups given up while the batch was collected; see the ledger",
    ),
    ("policy/grad_norm", "policy", "", "gradient norm of the policy before clipping"),
    ("policy/learning_rate", "policy", "", "learning rate of the policy"),
    ("value/loss", "value loss", "", "clipped squared error of the critic"),
    ("value/clip_fraction", "value", "%", "share of tokens whose value was clipped"),
    ("value/explained_variance", "explained variance", "", "1 − Var(return − value) / Var(return)"),
    ("value/mean", "value, mean", "", "mean of the critic's values over tokens"),
    ("value/variance", "value, variance", "", "variance of the critic's values over tokens"),
    ("value/grad_norm", "value", "", "gradient norm of the critic before clipping"),
    ("value/learning_rate", "value", "", "learning rate of the critic"),
    ("return/mean", "return, mean", "", "mean return over tokens"),
    ("return/variance", "return, variance", "", "variance of the return over tokens"),
    (
        "engine/logprob_difference_mean",
        "mean",
        "nats",
        "mean |Δ log-probability| per token, learner against rollout engine",
    ),
    (
        "engine/logprob_difference_max",
        "max",
        "nats",
        "largest |Δ log-probability| of a token, learner against rollout engine",
    ),
    ("publishing/win_rate", "win rate", "%", "share of held-out prompts won against the policy that was published last"),
    ("publishing/win_rate_low", "its lower end", "%", "lower end of the 95 % interval of that win rate"),
    ("staleness/mean", "mean", "updates", "mean age of the trained tokens' policy, in optimizer updates"),
    ("staleness/max", "max", "updates", "age of the oldest trained token's policy, in optimizer updates"),
    ("throughput/samples_per_s", "samples/s", "1/s", "responses trained per second of wall time"),
    ("throughput/tokens_per_s", "tokens/s", "1/s", "tokens trained per second of wall time"),
    ("time/step_s", "step", "s", "wall time of the whole step"),
    ("loss", "training", "", "training loss of the stage"),
    ("accuracy", "training", "%", "share of training pairs that the reward model orders as the annotator did"),
    ("learning_rate", "learning rate", "", "learning rate of the stage"),
    ("epoch", "epoch", "", "passes over the data"),
    ("grad_norm", "gradient norm", "", "gradient norm before clipping"),
    ("heldout/loss", "held out", "", "loss on data that the stage does not train on"),
    ("heldout/accuracy", "held out", "%", "share of held-out pairs that the reward model orders as the annotator did"),
)

METRICS: dict[str, Metric] = {row[0]: Metric(*row) for row in _ROWS}

_FAMILIES = (
    (re.compile(r"time/(?P<part>.+)_s"), "s", "wall time of the step in which this phase was active"),
    (re.compile(r"idle/(?P<part>.+)"), "%", "share of the step's wall time in which this role did nothing"),
    (re.compile(r"throughput/(?P<part>.+)_tokens_per_s"), "1/s", "tokens that this role handled per second"),
    (re.compile(r"reward/part/(?P<part>.+)"), "", "mean score of this source, before its weight"),
    (re.compile(r"service/(?P<part>.+_s)"), "s", "latency of a judge or another service that is asked for rewards"),
    (
        re.compile(r"service/(?P<part>.+_rate)"),
        "%",
        "share: questions from the cache, verdicts that flipped with the order, …",
    ),
    (
        re.compile(r"service/(?P<part>.+)"),
        "",
        "what a judge or another service was asked for in the step, and what it cost",
    ),
)


def describe(name: str) -> Metric:
    """The catalogue's entry for a name, one made from its family (`time/<phase>_s`, …), or the bare name."""
    if name in METRICS:
        return METRICS[name]
    for pattern, unit, description in _FAMILIES:
        if match := pattern.fullmatch(name):
            return Metric(name, match["part"].replace("_", " "), unit, description)
    return Metric(name, name, "", name)


def gauge_name(name: str) -> str:
    """The name of a metric's Ray gauge."""
    return "rlhf_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
