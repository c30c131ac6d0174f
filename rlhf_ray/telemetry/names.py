"""The catalogue of metrics. A metric has the same name everywhere.

A name has the form `<subject>/<figure>`; seconds end in `_s`, rates in `_per_s`. metrics.jsonl, TensorBoard and Weights &
Biases use the name itself. The Ray gauge is `rlhf_` and the name, with every character outside [a-zA-Z0-9_] replaced by `_` and
the tags `run` and `stage`. Ray exports gauges to Prometheus with the prefix `ray_`, so `reward/mean` becomes
`ray_rlhf_reward_mean`. Metrics outside the catalogue are recorded like any other.

Invariant: every metric that this package records is in `METRICS` or in one of `FAMILIES`; docs/metrics.md is generated from both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_NOT_ALLOWED = r"[^a-zA-Z0-9_]"
PPO, SFT, REWARD_MODEL = "PPO", "SFT", "reward model"
SUPERVISED = f"{SFT}, {REWARD_MODEL}"
EVERY = f"{SUPERVISED}, {PPO}"


@dataclass(frozen=True)
class Metric:
    """The meaning of a name."""

    name: str
    label: str
    """Short name for people."""
    unit: str
    """Empty for a plain number; `%` marks a share between 0 and 1 that is shown in per cent."""
    description: str
    stage: str = ""
    """The stages that record it, for people; empty if unknown."""


@dataclass(frozen=True)
class Family:
    """Names that differ in one part, which depends on the run: a phase, a role, a reward source or a service."""

    template: str
    """A name with a placeholder such as `<phase>`."""
    unit: str
    description: str
    stage: str = PPO

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the names of the family; its group is the part that varies."""
        before, _, after = re.split(r"(<\w+>)", self.template)
        return re.compile(f"{re.escape(before)}(.+){re.escape(after)}")

    @property
    def exported_name(self) -> str:
        """Like the function `exported_name`, with the placeholder."""
        before, part, after = re.split(r"(<\w+>)", self.template)
        return f"{exported_name(before)}{part}{re.sub(_NOT_ALLOWED, '_', after)}"

    def metric(self, name: str) -> Metric | None:
        """The catalogue's entry for a name of this family; None for other names."""
        if not (match := self.pattern.fullmatch(name)):
            return None
        figure = self.template.rpartition("/")[2]
        label = match[1] if "<" in figure else f"{match[1]}: {figure}"
        return Metric(name, label.replace("_", " "), self.unit, self.description, self.stage)


_PPO = (
    ("reward/mean", "reward", "", "mean score of the batch's responses, before any KL term"),
    ("reward/std", "reward, std", "", "standard deviation of the scores over the batch"),
    ("reward/shaped_mean", "reward − β·KL", "", "mean score minus the KL penalty: what the policy maximises"),
    ("kl/sequence", "KL", "nats", "KL to the reference per response: k1 summed over tokens, mean over the batch"),
    ("kl/coefficient", "β", "", "KL coefficient"),
    ("response/length_mean", "length", "tokens", "mean response length, the end-of-sequence token included"),
    ("response/length_max", "longest", "tokens", "longest response of the batch"),
    ("response/turns_mean", "turns", "", "mean number of the policy's turns in an episode"),
    ("response/eos_rate", "EOS rate", "%", "share of responses that end with an end-of-sequence token"),
    ("policy/entropy", "entropy", "nats", "mean entropy of the policy over response tokens"),
    ("policy/loss", "policy loss", "", "clipped surrogate loss"),
    ("policy/approx_kl", "approx. KL", "nats", "k3 estimate per token between the policy before and after the update"),
    ("policy/clip_fraction", "policy", "%", "share of tokens whose probability ratio was clipped"),
    ("policy/ratio_mean", "ratio, mean", "", "mean probability ratio of new to old policy"),
    ("policy/ratio_variance", "ratio, variance", "", "variance of the probability ratio over tokens"),
    ("policy/ratio_max", "ratio, max", "", "largest probability ratio of the step"),
    (
        "policy/correction_mean",
        "correction",
        "",
        "mean importance weight of a token: probability under the learner over that under the rollout policy",
    ),
    ("policy/ptx_loss", "PTX loss", "nats", "cross-entropy of the demonstrations' tokens in the policy's steps"),
    ("discriminator/loss", "discriminator loss", "nats", "binary cross-entropy on the batch, before training on it"),
    (
        "discriminator/accuracy",
        "all",
        "%",
        "share classified correctly, samples and demonstrations weighted equally, before training on the batch",
    ),
    (
        "discriminator/accuracy_demonstrations",
        "demonstrations",
        "%",
        "share of demonstrations classified as demonstrations",
    ),
    (
        "discriminator/score_gap",
        "score gap",
        "nats",
        "mean of log D − log(1 − D) over demonstrations, minus the mean over samples",
    ),
    ("discriminator/trusted", "trusted", "%", "1 if the discriminator was accurate enough to reward the batch"),
    (
        "discriminator/skipped",
        "updates skipped",
        "%",
        "share of its updates that were skipped because it was accurate enough",
    ),
    ("discriminator/grad_norm", "discriminator", "", "gradient norm of the discriminator before clipping"),
    ("discriminator/learning_rate", "discriminator", "", "learning rate of the discriminator"),
    (
        "teacher/kl",
        "KL to teacher",
        "nats",
        "KL(policy‖teacher) per token, estimated from the sampled tokens or exact over the vocabulary",
    ),
    (
        "sampling/groups_dropped",
        "groups dropped",
        "groups",
        "groups dropped while the batch was collected; the ledger has the reasons",
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
        "mean |Δ log-probability| per token between learner and rollout engine",
    ),
    (
        "engine/logprob_difference_max",
        "max",
        "nats",
        "largest |Δ log-probability| of a token between learner and rollout engine",
    ),
    (
        "publishing/win_rate",
        "win rate",
        "%",
        "share of held-out prompts won against the last published policy",
    ),
    ("publishing/win_rate_low", "win rate, lower end", "%", "lower end of the 95 % interval of that win rate"),
    ("staleness/mean", "mean", "updates", "mean number of policy updates between sampling a token and training on it"),
    ("staleness/max", "max", "updates", "largest number of policy updates between sampling a token and training on it"),
    ("throughput/samples_per_s", "samples/s", "1/s", "responses trained per second of wall time"),
    ("time/step_s", "step", "s", "wall time of the whole step"),
)

_OTHERS = (
    (
        "loss",
        "training",
        "",
        "training loss of the stage: nats per token in SFT, per pair, ranking or rating in a reward model",
        SUPERVISED,
    ),
    ("heldout/loss", "held out", "", "the loss on held-out data", SUPERVISED),
    ("entropy", "training", "nats", "mean entropy of the model over the tokens it is trained on", SFT),
    ("heldout/entropy", "held out", "nats", "the entropy on held-out data", SFT),
    (
        "accuracy",
        "training",
        "%",
        "share of training pairs that the reward model orders as the annotator did",
        REWARD_MODEL,
    ),
    (
        "heldout/accuracy",
        "held out",
        "%",
        "share of held-out pairs that the reward model orders as the annotator did",
        REWARD_MODEL,
    ),
    ("margin", "training", "", "mean reward of the preferred answer minus that of the other", REWARD_MODEL),
    ("heldout/margin", "held out", "", "the margin on held-out data", REWARD_MODEL),
    (
        "labels_meant",
        "training",
        "%",
        "share of labels that annotators meant, if their reliability is learned",
        REWARD_MODEL,
    ),
    ("heldout/labels_meant", "held out", "%", "the share of meant labels on held-out data", REWARD_MODEL),
    (
        "explained_variance",
        "training",
        "",
        "share of the ratings' variance that the reward model explains",
        REWARD_MODEL,
    ),
    ("heldout/explained_variance", "held out", "", "the explained variance on held-out data", REWARD_MODEL),
    ("learning_rate", "learning rate", "", "learning rate of the stage", SUPERVISED),
    ("grad_norm", "gradient norm", "", "gradient norm before clipping", SUPERVISED),
    ("epoch", "epoch", "", "passes over the data", SUPERVISED),
    ("throughput/tokens_per_s", "tokens/s", "1/s", "tokens trained per second of wall time", EVERY),
)

METRICS: dict[str, Metric] = {row[0]: Metric(*row, PPO) for row in _PPO} | {row[0]: Metric(*row) for row in _OTHERS}

FAMILIES = (
    Family("time/<phase>_s", "s", "wall time of the step in which this phase was active"),
    Family("idle/<role>", "%", "share of the step's wall time in which this role was idle"),
    Family("throughput/<role>_tokens_per_s", "1/s", "tokens that this role processed per second of its active time"),
    Family("reward/part/<source>", "", "mean score from this source, before weighting"),
    Family(
        "service/<name>/requests",
        "requests",
        "requests sent to this judge or other service in the step, retries included",
    ),
    Family(
        "service/<name>/retries",
        "requests",
        "requests sent again because the service was unreachable, slow, busy or broken",
    ),
    Family("service/<name>/unreadable", "answers", "answers of the service that could not be parsed"),
    Family("service/<name>/failures", "questions", "questions that got no answer after all retries"),
    Family("service/<name>/cache_hit_rate", "%", "share of questions answered from the cache"),
    Family("service/<name>/latency_mean_s", "s", "mean time until the service answered a request"),
    Family("service/<name>/latency_max_s", "s", "longest time until the service answered a request"),
    Family(
        "service/<name>/flip_rate",
        "%",
        "share of a judge's comparisons whose result changes with the order of the answers",
    ),
    Family("service/<name>/first_rate", "%", "share of a judge's votes for the response that it was shown first"),
    Family("service/<name>/prompt_tokens", "tokens", "prompt tokens that the service processed"),
    Family("service/<name>/completion_tokens", "tokens", "tokens that the service generated"),
    Family("service/<name>/cost", "", "cost of the requests, in the currency of the configured prices"),
)


FAULTS = Metric(
    "events/faults", "faults", "", "faults of the run so far; those after the last step are counted there", PPO
)
"""Computed by the report from the events and recorded nowhere, so it is neither in the catalogue nor in docs/metrics.md."""


def find_metric(name: str) -> Metric | None:
    """The catalogue's entry for a name, or one from its family (`time/<phase>_s`, …); None for unknown names."""
    if name in METRICS:
        return METRICS[name]
    return next((metric for family in FAMILIES if (metric := family.metric(name))), None)


def describe(name: str) -> Metric:
    """Like `find_metric`, also for `FAULTS`. Unknown names describe themselves."""
    return (FAULTS if name == FAULTS.name else find_metric(name)) or Metric(name, name, "", name)


def gauge_name(name: str) -> str:
    """The name of a metric's Ray gauge."""
    return "rlhf_" + re.sub(_NOT_ALLOWED, "_", name)


def exported_name(name: str) -> str:
    """The name of a metric in Prometheus."""
    return "ray_" + gauge_name(name)
