"""A reward model behind the endpoint: answers are scored in batches, as in training, and by the same code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from rlhf_ray.config.scoring import RewardConfig, RewardModelSource
from rlhf_ray.config.serving import ServingConfig
from rlhf_ray.data.tokenize import encode_prompt
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.scoring.errors import RewardError
from rlhf_ray.scoring.model_reward import ModelReward
from rlhf_ray.storage.folders import copy_here
from rlhf_ray.types import Prompt, Rollout, RolloutRequest

BATCH_WAIT_S = 0.005
REQUESTS = 64
"""That are scored together, at most."""


class ScoreRequest(BaseModel):
    """What `ppo.reward.http` sends, so that an endpoint can be the reward of another run."""

    model_config = ConfigDict(extra="ignore")

    prompts: list[list[dict[str, str]]] = Field(min_length=1, max_length=256)
    """A conversation for each response."""
    responses: list[str]
    """As many."""


class RewardServer:
    """One replica."""

    def __init__(self, folder: str, threads: int, gpus: float) -> None:
        torch.set_num_threads(threads)
        folder = copy_here(folder)
        source, device = RewardModelSource(path=folder), torch.device("cuda" if gpus else "cpu")
        self.tokenizer = load_tokenizer(folder)
        self.reward = ModelReward([folder], source, RewardConfig(model=source), device)

    @serve.batch(max_batch_size=REQUESTS, batch_wait_timeout_s=BATCH_WAIT_S)
    async def score(self, requests: list[ScoreRequest]) -> list[list[float | None]]:
        """The normalised rewards of each request's responses; None where there is none."""
        rollouts = [
            self._rollout(prompt, response)
            for request in requests
            for prompt, response in zip(request.prompts, request.responses, strict=True)
        ]
        answers = iter(self.reward.score(rollouts))
        return [[_number(next(answers)) for _ in request.responses] for request in requests]

    def _rollout(self, messages: Sequence[dict[str, str]], response: str) -> Rollout:
        prompt_ids = encode_prompt(self.tokenizer, messages)
        said = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        ids = np.asarray([*said, self.tokenizer.eos_token_id], dtype=np.int32)
        nothing = np.zeros(len(ids), dtype=np.int32)
        request = RolloutRequest(Prompt("served", prompt_ids, tuple(messages)), 0, 0)
        return Rollout(request, ids, nothing.astype(np.float32), nothing, "stop")


def build_rewards(config: ServingConfig) -> Application:
    """Replicas that score; without a route of their own."""
    workers = config.rewards
    options: dict[str, Any] = {
        "num_cpus": workers.cpus,
        "num_gpus": workers.gpus,
        "resources": workers.resources,
        "runtime_env": {"env_vars": workers.process_environment},
    }
    deployment = serve.deployment(
        RewardServer,
        num_replicas=workers.count,
        max_ongoing_requests=4 * REQUESTS,
        ray_actor_options=options,
        graceful_shutdown_timeout_s=config.limits.timeout_s,
    )
    return deployment.bind(config.reward_model, workers.threads, workers.gpus)


def _number(answer: float | RewardError) -> float | None:
    return None if isinstance(answer, RewardError) else float(answer)
