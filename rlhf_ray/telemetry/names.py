"""The catalogue of metrics: one name for each figure, wherever it appears.

A name is `<subject>/<figure>`; seconds end in `_s`, rates in `_per_s`. In metrics.jsonl, TensorBoard and Weights & Biases it
stands as it is. As a Ray gauge it is `rlhf_` and the name with every character outside [a-zA-Z0-9_] replaced by `_`, with
the tags `run` and `stage`; Ray exports a gauge to Prometheus with `ray_` before it, so `reward/mean` is
`ray_rlhf_reward_mean` there. Figures outside the catalogue are recorded like any other.

Invariant: every figure that this package records is in `METRICS` or in one of `FAMILIES`; docs/metrics.md is made of both.
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
    """What a name means."""

    name: str
    label: str
    """Short, for a person."""
    unit: str
    """Empty for a pure number; `%` marks a share between 0 and 1 that is shown in per cent."""
    description: str
    stage: str = ""
    """The stages that record it, for a person; empty where nobody knows."""


@dataclass(frozen=True)
class Family:
    """Names that differ in a part which the run chose: a phase, a role, a source of reward, a service."""

    template: str
    """A name with `<part>` in it, the word in angle brackets saying what it is."""
    unit: str
    description: str
    stage: str = PPO

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the family's names; its group is the part."""
        before, _, after = re.split(r"(<\w+>)", self.template)
        return re.compile(f"{re.escape(before)}(.+){re.escape(after)}")

    @property
    def exported_name(self) -> str:
        """As `exported_name`, with the part left open."""
        before, part, after = re.split(r"(<\w+>)", self.template)
        return f"{exported_name(before)}{part}{re.sub(_NOT_ALLOWED, '_', after)}"

    def metric(self, name: str) -> Metric | None:
        """The catalogue's entry for one of the names; None for a name that is none of them."""
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
    (
        "publishing/win_rate",
        "win rate",
        "%",
        "share of held-out prompts won against the policy that was published last",
    ),
    ("publishing/win_rate_low", "its lower end", "%", "lower end of the 95 % interval of that win rate"),
    ("staleness/mean", "mean", "updates", "mean age of the trained tokens' policy, in optimizer updates"),
    ("staleness/max", "max", "updates", "age of the oldest trained token's policy, in optimizer updates"),
    ("throughput/samples_per_s", "samples/s", "1/s", "responses trained per second of wall time"),
    ("time/step_s", "step", "s", "wall time of the whole step"),
)

_OTHERS = (
    (
        "loss",
        "training",
        "",
        "training loss of the stage: nats per token in SFT, per pair, ranking or mark in a reward model",
        SUPERVISED,
    ),
    ("heldout/loss", "held out", "", "the same on data that the stage does not train on", SUPERVISED),
    ("entropy", "training", "nats", "mean entropy of the model over the tokens that it learns", SFT),
    ("heldout/entropy", "held out", "nats", "the same on data that the stage does not train on", SFT),
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
    ("margin", "training", "", "mean reward of the answer said to be better, less that of the other", REWARD_MODEL),
    ("heldout/margin", "held out", "", "the same on data that the stage does not train on", REWARD_MODEL),
    (
        "labels_meant",
        "training",
        "%",
        "share of labels that annotators meant, where their reliability is learned",
        REWARD_MODEL,
    ),
    ("heldout/labels_meant", "held out", "%", "the same on data that the stage does not train on", REWARD_MODEL),
    ("explained_variance", "training", "", "share of the marks' variance that the reward model explains", REWARD_MODEL),
    ("heldout/explained_variance", "held out", "", "the same on data that the stage does not train on", REWARD_MODEL),
    ("learning_rate", "learning rate", "", "learning rate of the stage", SUPERVISED),
    ("grad_norm", "gradient norm", "", "gradient norm before clipping", SUPERVISED),
    ("epoch", "epoch", "", "passes over the data", SUPERVISED),
    ("throughput/tokens_per_s", "tokens/s", "1/s", "tokens trained per second of wall time", EVERY),
)

METRICS: dict[str, Metric] = {row[0]: Metric(*row, PPO) for row in _PPO} | {row[0]: Metric(*row) for row in _OTHERS}

FAMILIES = (
    Family("time/<phase>_s", "s", "wall time of the step in which this phase was active"),
    Family("idle/<role>", "%", "share of the step's wall time in which this role did nothing"),
    Family("throughput/<role>_tokens_per_s", "1/s", "tokens that this role handled per second of its own time"),
    Family("reward/part/<source>", "", "mean score of this source, before its weight"),
    Family(
        "service/<name>/requests", "requests", "sent to this judge or other service in the step, repeated ones included"
    ),
    Family(
        "service/<name>/retries", "requests", "sent again, because the service was not reached, slow, busy or broken"
    ),
    Family("service/<name>/unreadable", "answers", "answers of the service that could not be read"),
    Family("service/<name>/failures", "questions", "questions that were given up"),
    Family("service/<name>/cache_hit_rate", "%", "share of the questions that the cache answered"),
    Family("service/<name>/latency_mean_s", "s", "mean time that the service took to answer a request"),
    Family("service/<name>/latency_max_s", "s", "its slowest answer"),
    Family("service/<name>/flip_rate", "%", "share of a judge's comparisons said otherwise in the other order"),
    Family("service/<name>/first_rate", "%", "share of a judge's votes for the response that came first"),
    Family("service/<name>/prompt_tokens", "tokens", "tokens that the service read"),
    Family("service/<name>/completion_tokens", "tokens", "tokens that the service wrote"),
    Family("service/<name>/cost", "", "what they cost, in the currency of the configured prices"),
)


FAULTS = Metric("events/faults", "faults", "", "faults of the run so far; those after the last step stand with it", PPO)
"""The report's own figure, made of the events and recorded nowhere: neither in the catalogue nor in docs/metrics.md."""


def known(name: str) -> Metric | None:
    """The catalogue's entry for a name, or one made from its family (`time/<phase>_s`, …); None for what is in neither."""
    if name in METRICS:
        return METRICS[name]
    return next((metric for family in FAMILIES if (metric := family.metric(name))), None)


def describe(name: str) -> Metric:
    """As `known`, and `FAULTS`; the bare name for what is not."""
    return (FAULTS if name == FAULTS.name else known(name)) or Metric(name, name, "", name)


def gauge_name(name: str) -> str:
    """The name of a metric's Ray gauge."""
    return "rlhf_" + re.sub(_NOT_ALLOWED, "_", name)


def exported_name(name: str) -> str:
    """The name under which Prometheus finds a metric."""
    return "ray_" + gauge_name(name)
