"""The PPO stage: its roles, batches, placement and checkpoints; and the evaluation of policies."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.learner import LearnerConfig
from rlhf_ray.config.reward import RewardConfig, ScorerConfig
from rlhf_ray.config.rollout import EnvironmentConfig, RolloutConfig
from rlhf_ray.config.section import ImportPath, Section
from rlhf_ray.config.serving import PublishingConfig
from rlhf_ray.config.teacher import DiscriminatorConfig, TeacherConfig
from rlhf_ray.roles import RoleName


class PlacementConfig(Section):
    """How actors are placed on nodes."""

    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy for the bundles of the roles."""
    colocate: list[list[RoleName]] = []
    """Groups of roles whose actors share a bundle, such as `[[rollout, policy]]` with 0.5 GPUs each: two actors on one
    GPU."""
    timeout_s: float = Field(300.0, gt=0)
    """How long to wait until the cluster has room for all actors, in seconds."""

    @field_validator("colocate")
    @classmethod
    def _each_role_once(cls, groups: list[list[str]]) -> list[list[str]]:
        roles = [role for group in groups for role in group]
        twice = sorted({role for role in roles if roles.count(role) > 1})
        if twice:
            raise ValueError(f"a role can be in one group only; named twice: {', '.join(twice)}")
        return groups


class CheckpointConfig(Section):
    """Checkpoints from which a run can continue."""

    every: int = Field(10, ge=1)
    """PPO steps between checkpoints. The last step always has one."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints that are kept."""


class PpoConfig(Section):
    """The reinforcement-learning stage and its roles."""

    steps: int = Field(100, ge=1)
    """Number of batches to train on."""
    batch_size: int = Field(64, ge=1)
    """Rollouts per step."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses to each prompt (the group). It must divide `batch_size`."""
    epochs: int = Field(1, ge=1)
    """Passes over each batch."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps per pass. It must divide `batch_size`."""
    staleness: int = Field(0, ge=0, le=0)
    """Policy versions by which a rollout may lag behind the learner. Only 0, synchronous training, is supported."""
    policy_model: str | None = None
    """Folder of the initial policy and of the reference policy; null: this run's SFT model, or `model.path` without that
    stage."""
    value_model: str | None = None
    """Folder of the initial value model; null: the reward model, or the policy's model if there is none."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """Advantages, policy loss, KL penalty and aggregation of the loss."""
    rollout: RolloutConfig = RolloutConfig()
    """Generation of rollouts."""
    policy: LearnerConfig = LearnerConfig()
    """The learner of the policy."""
    value: LearnerConfig = LearnerConfig()
    """The learner of the value model. It is started only for estimators that need one, such as `gae`."""
    reward: RewardConfig = RewardConfig()
    """Scoring of responses."""
    reference: ScorerConfig = ScorerConfig()
    """Workers of the frozen reference policy. They are started only if the algorithm has a KL term."""
    share_reference: bool = False
    """Use the policy's learner without its adapters as the reference, without a second copy of the model and without
    reference workers. Needs `policy.lora`."""
    teacher: TeacherConfig | None = None
    """A larger model to learn from, in addition to the reward or instead of it; null: none."""
    discriminator: DiscriminatorConfig | None = None
    """A reward that is learned from `data.demonstrations` during training, in addition to other rewards or instead of them;
    null: none."""
    environment: EnvironmentConfig | None = None
    """Episodes of several turns; null: a rollout is one response."""
    publishing: PublishingConfig | None = None
    """Publish better policies to an endpoint during training; null: do not."""
    placement: PlacementConfig = PlacementConfig()
    """Where the actors run."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written and how many are kept."""

    @property
    def longest_response(self) -> int:
        """Largest number of tokens that the policy samples in one rollout."""
        return self.rollout.sampling.max_new_tokens * (self.environment.max_turns if self.environment else 1)

    @property
    def longest_rollout(self) -> int:
        """Largest number of tokens that follow a prompt, including the answers of an environment."""
        if self.environment is None:
            return self.longest_response
        return self.longest_response + (self.environment.max_turns - 1) * self.environment.max_observation_tokens

    @model_validator(mode="after")
    def _divisible(self) -> PpoConfig:
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by its group, samples_per_prompt {self.samples_per_prompt}"
            )
        if self.batch_size % self.minibatches:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by minibatches {self.minibatches}")
        if self.algorithm.needs_groups and self.samples_per_prompt < 2:
            raise ValueError(
                f"advantage {self.algorithm.advantage} compares the responses to one prompt; set samples_per_prompt to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _adapters_where_they_work(self) -> PpoConfig:
        if self.value.lora is not None:
            raise ValueError("value.lora: adapters are for the policy; the value model trains all weights, remove it")
        if self.policy.lora is None and self.share_reference:
            raise ValueError(
                "share_reference: without policy.lora the learner does not keep its initial model; set policy.lora, or remove it"
            )
        if self.policy.lora is None and self.rollout.weights.lora == "adapter":
            raise ValueError(
                "rollout.weights.lora is adapter, but the policy has no adapter: set policy.lora, or use merged"
            )
        return self

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> PpoConfig:
        others = (self.environment, self.discriminator)
        rewarded, advantage = self.reward.has_sources or others != (None, None), self.algorithm.advantage
        reads_rewards = self.algorithm.estimator.reads_rewards
        if not rewarded and self.teacher is None:
            raise ValueError(
                "no source of reward: set reward.model, add to reward.functions, judges or http, or set environment, "
                "discriminator or teacher"
            )
        if not rewarded and reads_rewards:
            raise ValueError(
                f"there is a teacher and no reward, but algorithm.advantage {advantage} needs a reward: set it to none"
            )
        if rewarded and not reads_rewards:
            raise ValueError(
                f"algorithm.advantage {advantage} reads no reward, but reward has sources; remove them "
                "(reward.model: null removes the reward model)"
            )
        if self.reward.needs_groups and self.samples_per_prompt < 2:
            raise ValueError(
                "reward.judges: a pairwise judge without a reference compares the responses to one prompt; set "
                "samples_per_prompt to 2 or more"
            )
        if self.reward.needs_groups and self.environment is not None:
            raise ValueError(
                "reward.judges: a pairwise judge without a reference compares responses to the same conversation, and episodes "
                "of an environment differ after their first turn; give it a reference, or use mode pointwise"
            )
        return self

    @model_validator(mode="after")
    def _discriminator_fits(self) -> PpoConfig:
        if self.discriminator is None:
            return self
        if self.batch_size % self.discriminator.minibatches:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by discriminator.minibatches {self.discriminator.minibatches}"
            )
        if self.algorithm.dynamic_sampling is not None:
            raise ValueError(
                "algorithm.dynamic_sampling replaces groups by their scores as they arrive, but the discriminator scores the "
                "whole batch later; remove one of them"
            )
        if any(source.name == "discriminator" for source in (*self.reward.functions, *self.reward.services)):
            raise ValueError(
                "a source of reward is named 'discriminator', which is the name of the reward of ppo.discriminator; rename it"
            )
        return self

    @model_validator(mode="after")
    def _algorithm_fits_sampling(self) -> PpoConfig:
        sampling, overlong = self.rollout.sampling, self.algorithm.overlong
        if overlong is not None and overlong.buffer_tokens > self.longest_response:
            raise ValueError(
                f"algorithm.overlong.buffer_tokens {overlong.buffer_tokens} is more than rollout.sampling.max_new_tokens "
                f"{self.longest_response}{' of all turns' if self.environment else ''}, the limit of a response"
            )
        if self.algorithm.ptx is not None and sampling.temperature != 1:
            raise ValueError(
                f"algorithm.ptx learns from demonstrations at temperature 1, but a step computes all log-probabilities at "
                f"rollout.sampling.temperature, which is {sampling.temperature:g}; set it to 1, or remove ptx"
            )
        return self


class EvaluationConfig(Section):
    """Comparison of the base, SFT and PPO policies on held-out prompts."""

    prompts: int = Field(256, ge=1)
    """Held-out prompts to answer. All are used if there are fewer."""
    utility: ImportPath | None = None
    """`package.module:function` with the interface of a reward function that gives the true utility; null: none, except that
    `data.simulate` sets its own."""
