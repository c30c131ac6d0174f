"""Checks before anything starts: model folders, functions, services, resources."""

from __future__ import annotations

import os

import ray
from transformers import AutoConfig

from rlhf_ray.config.loading import ConfigError
from rlhf_ray.config.reward import RewardConfig
from rlhf_ray.config.rollout import EnvironmentConfig
from rlhf_ray.config.run import RunConfig
from rlhf_ray.environments.calls import check_environment
from rlhf_ray.environments.template import TurnRenderer
from rlhf_ray.models.loading import (
    check_model_folder,
    check_reward_model,
    check_same_tokenizer,
    load_tokenizer,
    local_folder,
)
from rlhf_ray.rewards.http import read_keys
from rlhf_ray.rewards.judge_prompts import Questions
from rlhf_ray.rewards.sources import resolve_function
from rlhf_ray.runtime.placement import plan_placement
from rlhf_ray.telemetry.wandb_log import check_wandb


def check_run(config: RunConfig) -> None:
    """Check everything outside the config that it names.

    Raises:
        NotAModel, RewardModelMismatch, ConfigError: naming the key, the value and what is expected.
    """
    policy = _check_models(config)
    if {"ppo", "evaluation"} & set(config.stages):
        _check_services(config.ppo.reward)
    check_wandb(config.telemetry.wandb)
    for source in config.ppo.reward.functions:
        _resolve("ppo.reward.functions", source.function)
    if config.ppo.environment is not None:
        _check_environment(config.ppo.environment, policy)
    if config.evaluation.utility is not None:
        _resolve("evaluation.utility", config.evaluation.utility)
    if config.cluster.address is None and not ray.is_initialized():
        _check_machine(config)
        if config.ppo.publishing is not None:
            raise ConfigError(
                "ppo.publishing publishes policies to an endpoint on the run's cluster, and cluster.address is null: the private "
                "cluster of a run has no endpoint; set cluster.address (auto: the cluster on this machine), or submit the run"
            )


def _check_models(config: RunConfig) -> str | None:
    """Check the model folders that the config names; returns the folder of the policy, or None if the run builds it."""
    ppo, reward = config.ppo, config.ppo.reward.model
    reward_paths = reward.paths if reward is not None else ()
    named = {
        "model.path": config.model.path,
        "ppo.policy_model": ppo.policy_model,
        "ppo.value_model": ppo.value_model,
        **{"ppo.reward.model.path" + (f"[{i}]" if i else ""): path for i, path in enumerate(reward_paths)},
        "ppo.teacher.model": ppo.teacher.model if ppo.teacher else None,
        "ppo.discriminator.model": ppo.discriminator.model if ppo.discriminator else None,
    }
    folders = {key: local_folder(path) for key, path in named.items() if path is not None}
    for key, folder in folders.items():
        check_model_folder(folder, key)
    policy = folders.get("ppo.policy_model") or folders.get("model.path")
    for key, folder in folders.items():
        if policy is not None and key not in ("model.path", "ppo.policy_model"):
            check_same_tokenizer(folder, policy, key)
        if key.startswith("ppo.reward.model.path") and reward is not None:
            check_reward_model(folder, reward.group)
    if policy is not None:
        _check_context(config, policy)
    for key in ("ppo.teacher.model", "ppo.discriminator.model"):
        if key in folders:
            _check_context(config, folders[key])
    return policy


def _check_services(reward: RewardConfig) -> None:
    """Check that the services' keys are set and that the judges' prompt templates can be filled in."""
    read_keys(reward)
    for judge in reward.judges:
        Questions(judge)


def _resolve(key: str, function: str) -> None:
    try:
        resolve_function(function)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def _check_environment(environment: EnvironmentConfig, policy: str | None) -> None:
    try:
        check_environment(environment)
    except ValueError as error:
        raise ConfigError(f"ppo.environment: {error}") from error
    if policy is not None and environment.max_turns > 1:
        TurnRenderer(load_tokenizer(policy)).check()


def _check_context(config: RunConfig, model: str) -> None:
    positions = getattr(AutoConfig.from_pretrained(model, trust_remote_code=False), "max_position_embeddings", None)
    longest = max(config.data.max_dialogue_tokens, config.context_tokens)
    if positions is not None and positions < longest:
        raise ConfigError(
            f"model {model!r} reads at most {positions} tokens; data.max_dialogue_tokens and {config.explained_context} allow "
            f"{longest}: lower them"
        )


def _check_machine(config: RunConfig) -> None:
    """Check that the stages fit on this machine, which is all that a private cluster has."""
    plan = plan_placement(config.roles, config.ppo.placement.colocate)
    supervised = {"sft": config.sft, "reward_model": config.reward_model}
    asked = {"ppo": plan.totals} | {
        name: {
            "CPU": s.learner.workers.cpus * s.learner.workers.count,
            "GPU": s.learner.workers.gpus * s.learner.workers.count,
        }
        for name, s in supervised.items()
    }
    have = {"CPU": float(os.cpu_count() or 1), "GPU": float(_gpus())}
    for stage in config.stages:
        for name, need in asked.get(stage, {}).items():
            if need > have.get(name, 0.0) + 1e-6:
                raise ConfigError(
                    f"stage {stage} needs {need:g} {name} in total and this machine has {have.get(name, 0.0):g}; lower the "
                    f"roles' workers.count or workers.{name.lower()}s, or set cluster.address to a larger cluster"
                )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
