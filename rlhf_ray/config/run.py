"""`RunConfig`: the whole config of a run in one immutable object."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.data import DataConfig, ModelConfig
from rlhf_ray.config.ppo import EvaluationConfig, PpoConfig
from rlhf_ray.config.section import Section, Workers
from rlhf_ray.config.supervised import RewardModelConfig, SupervisedConfig
from rlhf_ray.config.telemetry import AlertsConfig, TelemetryConfig
from rlhf_ray.roles import ROLES
from rlhf_ray.runs.storage.location import check_uri, is_uri

Stage = Literal["sft", "reward_model", "ppo", "evaluation"]
STAGES: tuple[Stage, ...] = ("sft", "reward_model", "ppo", "evaluation")


class ClusterConfig(Section):
    """The Ray cluster that the run uses."""

    address: str | None = None
    """Cluster to join: `host:port`, `ray://host:port`, or `auto` for the one on this machine or in RAY_ADDRESS; null: start
    a private one on this machine and stop it with the run."""


class RunConfig(Section):
    """A run: one folder and up to four stages."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    folder: str = "runs"
    """Folder that holds the run folders, or a store such as s3://bucket/prefix. On a cluster all nodes must see it."""
    seed: int = Field(0, ge=0)
    """Seed of everything random in the run."""
    stages: list[Stage] = list(STAGES)
    """Stages to run, in the order sft, reward_model, ppo, evaluation."""
    model: ModelConfig
    """The model that the first stage starts from."""
    data: DataConfig
    """Demonstrations, feedback and prompts."""
    sft: SupervisedConfig = SupervisedConfig()
    """Supervised fine-tuning."""
    reward_model: RewardModelConfig = RewardModelConfig()
    """Training of the reward model."""
    ppo: PpoConfig = PpoConfig()
    """Reinforcement learning."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Comparison of the policies."""
    alerts: AlertsConfig = AlertsConfig()
    """Limits of metrics in the PPO stage, above or below which an alert is raised."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Metrics outside the run folder."""
    cluster: ClusterConfig = ClusterConfig()
    """The Ray cluster that runs the actors."""

    @field_validator("folder")
    @classmethod
    def _is_a_place(cls, folder: str) -> str:
        if is_uri(folder):
            check_uri(folder)
        return folder

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: list[Stage]) -> list[Stage]:
        if not stages or stages != [stage for stage in STAGES if stage in stages]:
            raise ValueError(f"stages must be some of {', '.join(STAGES)}, each once and in this order; got {stages}")
        return stages

    @model_validator(mode="after")
    def _inputs_exist(self) -> RunConfig:
        needs = {"sft": ("demonstrations",), "reward_model": self.reward_model.reads}
        needs |= {"ppo": ("prompts",), "evaluation": ("prompts",)}
        if self.data.simulate is None:
            for stage in self.stages:
                if all(getattr(self.data, name) is None for name in needs[stage]):
                    sources = " or ".join(f"data.{name}" for name in needs[stage])
                    raise ValueError(f"stage {stage} reads {sources}, which is not set (nor is data.simulate)")
            if "ppo" in self.stages and self.ppo.algorithm.ptx is not None and self.data.demonstrations is None:
                raise ValueError("ppo.algorithm.ptx learns from data.demonstrations, which is not set")
            if "ppo" in self.stages and self.ppo.discriminator is not None and self.data.demonstrations is None:
                raise ValueError("ppo.discriminator learns from data.demonstrations, which is not set")
        if self.model.build is not None and "sft" not in self.stages:
            if {"ppo", "evaluation"} & set(self.stages):
                raise ValueError("a model.build has random weights; add the stage sft before ppo and evaluation")
            if self.data.simulate is None and self.data.demonstrations is None:
                raise ValueError("the tokenizer of a model.build is trained on data.demonstrations, which is not set")
        reward = self.ppo.reward.model
        if "ppo" in self.stages and reward and reward.path is None and "reward_model" not in self.stages:
            raise ValueError(
                "ppo.reward.model.path is not set and the stage reward_model is not in stages; set one of them"
            )
        if reward and reward.combine != "mean" and len(reward.paths or range(self.reward_model.members)) == 1:
            raise ValueError(
                f"ppo.reward.model.combine is {reward.combine}, but there is only one reward model; set reward_model.members, "
                "name several folders in path, or use mean"
            )
        if reward and reward.group and reward.path is None and self.reward_model.groups is None:
            raise ValueError(
                f"ppo.reward.model.group is {reward.group!r}, but the reward model of this run learns no groups; set "
                "reward_model.groups, or remove it"
            )
        return self

    @model_validator(mode="after")
    def _sequences_fit(self) -> RunConfig:
        rollout = self.ppo.rollout
        one_turn = self.data.max_prompt_tokens + rollout.sampling.max_new_tokens
        if rollout.max_sequence_tokens is not None and rollout.max_sequence_tokens < one_turn:
            raise ValueError(
                f"ppo.rollout.max_sequence_tokens {rollout.max_sequence_tokens} is below data.max_prompt_tokens + "
                f"max_new_tokens = {one_turn}"
            )
        positions = self.model.build.max_positions if self.model.build else None
        if positions is not None and positions < max(self.context_tokens, self.data.max_dialogue_tokens):
            raise ValueError(
                f"model.build.max_positions {positions} is below the longest sequence: {self.context_tokens} of a prompt "
                f"and its rollout ({self.explained_context}), data.max_dialogue_tokens = {self.data.max_dialogue_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _colocated_roles_fit_gpus(self) -> RunConfig:
        """Refuse bundles that Ray would reserve but in which it would never start the actors."""
        for group in self.ppo.placement.colocate:
            members = {role: self.roles[role] for role in group if role in self.roles}
            for index in range(max((workers.count for workers in members.values()), default=0)):
                shares = {role: workers.gpus for role, workers in members.items() if workers.count > index}
                gpus = round(sum(shares.values()), 6)
                if gpus > 1 and not gpus.is_integer():
                    listing = ", ".join(f"{role} {share:g}" for role, share in shares.items())
                    raise ValueError(
                        f"ppo.placement.colocate: the actors that share bundle {index} ask for {gpus:g} GPUs in all "
                        f"({listing}); make that at most 1, or a whole number"
                    )
        return self

    @property
    def context_tokens(self) -> int:
        """Largest number of tokens of a prompt and its rollout."""
        return self.ppo.rollout.max_sequence_tokens or self.data.max_prompt_tokens + self.ppo.longest_rollout

    @property
    def explained_context(self) -> str:
        """The keys that `context_tokens` is computed from, for error messages."""
        if self.ppo.rollout.max_sequence_tokens:
            return "ppo.rollout.max_sequence_tokens"
        turns = " for each of environment.max_turns, and its answers" if self.ppo.environment else ""
        return f"data.max_prompt_tokens + ppo.rollout.sampling.max_new_tokens{turns}"

    @property
    def roles(self) -> dict[str, Workers]:
        """The sizes of the PPO stage's roles, by name."""
        return {name: getattr(self.ppo, name).workers for name, role in ROLES.items() if role.runs(self.ppo)}
