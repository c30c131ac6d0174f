"""From a run to the endpoint that it publishes to: how candidates are examined, and how the endpoint takes them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.run import RunConfig
from rlhf_ray.driver.extras.endpoint_publishing import Candidate, NotDeployed, Publishing
from rlhf_ray.driver.workers import Roles
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.storage.location import local, portable
from rlhf_ray.runtime.stopping import StopRequest
from rlhf_ray.stages.evaluation import answer, utility_of
from rlhf_ray.types import Prompt


def check_endpoint(config: RunConfig) -> None:
    """That the endpoint is there, on the cluster that this process is connected to.

    Raises:
        NoEndpoint: it is not.
    """
    if config.ppo.publishing is not None:
        from rlhf_ray.serving.endpoint import gateway_of

        gateway_of(config.ppo.publishing.endpoint)


def publishing(
    config: RunConfig,
    folder: RunFolder,
    roles: Roles,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    events: EventLog,
    push: Callable[[], None] | None,
    stop: StopRequest | None,
) -> Publishing:
    """What a run's `ppo.publishing` asks for; `prompts` are held out; `push` takes what is in the folder to a store; engines that
    are starting are not waited for when a `stop` is asked for."""
    utility = utility_of(config)

    async def examine(step: int) -> Candidate:
        answers = await answer(roles, prompts[: config.ppo.publishing.prompts], tokenizer, utility)
        values = answers.rewards if answers.utilities is None else answers.utilities
        return Candidate(step, values.tolist(), answers.kl)

    async def save(version_folder: Path) -> None:
        await roles.policy.save_pretrained(version_folder)
        if push is not None:
            await asyncio.to_thread(push)

    def deploy(step: int, version_folder: Path, share: float) -> list[str]:
        from ray.serve.exceptions import RayServeException

        from rlhf_ray.serving.endpoint import Endpoint
        from rlhf_ray.serving.versions import Version

        version = Version(f"{config.name}-{step}", portable(version_folder))
        try:
            endpoint = Endpoint.attach(config.ppo.publishing.endpoint)
            endpoint.give_up = lambda: stop is not None and stop.made
            versions = endpoint.versions
            # A resumed run comes to steps again whose policy, bit for bit this one, is served already.
            if version not in versions.alive:
                versions = endpoint.publish(version, share)
        except (RuntimeError, TimeoutError, RayServeException) as error:
            raise NotDeployed(str(error)) from error
        return [str(local(version.folder)) for version in versions.alive]

    return Publishing(config.ppo.publishing, folder.published, examine, save, deploy, events)
