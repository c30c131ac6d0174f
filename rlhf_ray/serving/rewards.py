"""A reward model as a Serve application: it scores responses in batches, with the same code as in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from rlhf_ray.config.reward import RewardConfig, RewardModelSource
from rlhf_ray.config.serving import ServingConfig
from rlhf_ray.data.tokenize import encode_prompt
from rlhf_ray.models.loading import context_of, load_tokenizer
from rlhf_ray.rewards.answers import RewardError
from rlhf_ray.rewards.model_reward import EnsembleScore, ModelReward
from rlhf_ray.runs.storage.folders import fetch_copy
from rlhf_ray.types import Prompt, Rollout, RolloutRequest

BATCH_WAIT_S = 0.005
REQUESTS = 64
"""Maximum number of requests in one batch."""


class Message(BaseModel):
    """A turn of a conversation. Other fields are ignored."""

    role: str
    content: str


class ScoreRequest(BaseModel):
    """The request body. `ppo.reward.http` sends the same, so an endpoint can be the reward of another run."""

    model_config = ConfigDict(extra="ignore")

    prompts: list[Annotated[list[Message], Field(min_length=1)]] = Field(min_length=1, max_length=256)
    """One conversation for each response."""
    responses: list[str]
    """One response for each prompt."""


class RewardServer:
    """One replica with the reward model."""

    def __init__(self, folder: str, threads: int, gpus: float) -> None:
        torch.set_num_threads(threads)
        folder = fetch_copy(folder)
        source, device = RewardModelSource(path=folder), torch.device("cuda" if gpus else "cpu")
        self.tokenizer, self.context = load_tokenizer(folder), context_of(folder)
        self.reward = ModelReward([folder], source, RewardConfig(model=source), device)

    async def score(self, request: ScoreRequest) -> list[float | None] | str:
        """The normalised rewards of a request's responses (None: not available), or the reason why the request is refused."""
        pairs = zip(request.prompts, request.responses, strict=True)
        try:
            rollouts = [self._rollout([m.model_dump() for m in messages], response) for messages, response in pairs]
        except TemplateError as error:
            return f"the model's chat template refuses a prompt: {error}"
        longest = max(len(rollout.request.prompt.token_ids) + len(rollout.token_ids) for rollout in rollouts)
        if longest > self.context:
            return (
                f"a prompt with its response is {longest} tokens long; the reward model accepts at most {self.context}"
            )
        return await self._batched(rollouts)

    @serve.batch(max_batch_size=REQUESTS, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _batched(self, requests: list[list[Rollout]]) -> list[list[float | None]]:
        answers = iter(self.reward.score([rollout for rollouts in requests for rollout in rollouts]))
        return [[_number(next(answers)) for _ in rollouts] for rollouts in requests]

    def _rollout(self, messages: Sequence[dict[str, str]], response: str) -> Rollout:
        prompt_ids = encode_prompt(self.tokenizer, messages)
        tokens = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        ids = np.asarray([*tokens, self.tokenizer.eos_token_id], dtype=np.int32)
        nothing = np.zeros(len(ids), dtype=np.int32)
        request = RolloutRequest(Prompt("served", prompt_ids, tuple(messages)), 0, 0)
        return Rollout(request, ids, nothing.astype(np.float32), nothing, "stop")


def build_rewards(config: ServingConfig) -> Application:
    """The application with the reward model's replicas. It has no route of its own."""
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


def _number(answer: float | EnsembleScore | RewardError) -> float | None:
    if isinstance(answer, RewardError):
        return None
    return answer.value if isinstance(answer, EnsembleScore) else float(answer)
