"""Publishes the policy to an endpoint during training, whenever it is better than the version published last.

Invariants: all candidates answer the same prompts with the same seeds; a candidate is compared with the last one that reached
the endpoint, also after a resume; training does not wait for the engines of a version, and an endpoint that fails only causes
a fault in the run's events.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ray.exceptions import RayError
from transformers import PreTrainedTokenizerBase

from rlhf_ray.algorithms.statistics import Share, win_rate
from rlhf_ray.config.run import RunConfig
from rlhf_ray.config.serving import PublishingConfig
from rlhf_ray.driver.answers import answer, utility_of
from rlhf_ray.driver.hooks import LoopHook
from rlhf_ray.driver.workers import Roles
from rlhf_ray.errors import InputError
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import atomic_write
from rlhf_ray.runs.storage.location import local, portable
from rlhf_ray.types import Prompt

if TYPE_CHECKING:
    from rlhf_ray.stages.run import Run


class NotDeployed(RuntimeError):
    """An endpoint refused a version; it still serves the versions that it served before."""


@dataclass(frozen=True)
class Candidate:
    """A policy and its scores on the held-out prompts."""

    step: int
    values: Sequence[float]
    """Utility of its answer to each prompt, or the reward if there is no utility; NaN if unknown."""
    kl: float | None
    """KL to the reference, nats per response; None if there is no reference."""


Examine = Callable[[int], Awaitable[Candidate]]
"""Evaluates the policy of the rollout workers, which is that of the given step."""
Save = Callable[[Path], Awaitable[None]]
"""Writes the policy as a Hugging Face folder."""
Deploy = Callable[[int, Path, float], Sequence[str]]
"""(step, folder, share of the traffic) → the folders that the endpoint serves now. Blocks until the engines of the version
answer; raises NotDeployed, InputError or RayError."""


class EndpointPublishing(LoopHook):
    """At every `every`-th step, compares the policy with the last published version and publishes it if it is better."""

    phase = "evaluation"

    def __init__(
        self, config: PublishingConfig, folder: Path, examine: Examine, save: Save, deploy: Deploy, events: EventLog
    ) -> None:
        """`folder`: keeps the versions that are served, and the candidate that was published last."""
        self.config, self.folder, self.events = config, folder, events
        self.examine, self.save_policy, self.deploy = examine, save, deploy
        self._last: Candidate | None = None
        self._deploying: asyncio.Task[None] | None = None

    async def start(self, steps_done: int) -> None:
        """Read the candidate that was published last. In a new run, the first policy is what candidates are compared with."""
        if self._record.is_file():
            self._last = Candidate(**json.loads(self._record.read_text()))
        else:
            self._remember(await self.examine(steps_done))

    async def after_sync(self, step: int) -> Mapping[str, float]:
        """Publish the policy if a comparison is due and it is better; returns the figures of the comparison."""
        if step % self.config.every:
            return {}
        if self._deploying is not None and not self._deploying.done():
            self.events.emit(
                "warning", f"the policy of step {step} was not evaluated: the last version is still starting"
            )
            return {}
        await self.close()
        candidate, last = await self.examine(step), self._last
        assert last is not None
        won = win_rate(np.asarray(candidate.values), np.asarray(last.values))
        if won is None:
            return {}
        if won.low > self.config.better_than and not self._too_far(candidate):
            folder = self.folder / f"step_{step}"
            await self.save_policy(folder)
            self._deploying = asyncio.create_task(self._publish(candidate, last, folder, won))
        return {"publishing/win_rate": won.value, "publishing/win_rate_low": won.low}

    async def close(self) -> None:
        """Wait until a version that is starting answers or has failed."""
        if self._deploying is not None:
            await self._deploying
            self._deploying = None

    def _too_far(self, candidate: Candidate) -> bool:
        limit = self.config.kl_limit
        if limit is None or candidate.kl is None or candidate.kl <= limit:
            return False
        self.events.emit(
            "warning",
            f"the policy of step {candidate.step} is better and was not published: its KL to the reference, "
            f"{candidate.kl:.3g} nats, is above ppo.publishing.kl_limit {limit:g}",
        )
        return True

    async def _publish(self, candidate: Candidate, last: Candidate, folder: Path, won: Share) -> None:
        try:
            served = await asyncio.to_thread(self.deploy, candidate.step, folder, self.config.share)
        except (NotDeployed, InputError, RayError) as error:
            self.events.emit("fault", f"the policy of step {candidate.step} was not published: {error}")
            shutil.rmtree(folder)
            return
        since = "the run began with" if last.step == 0 else f"of step {last.step}"
        self.events.emit(
            "release",
            f"the policy of step {candidate.step} is served: it wins {won.value:.0%} ({won.low:.0%}–{won.high:.0%}) of "
            f"{won.count} prompts against that {since}",
            step=candidate.step, win_rate=won.value, share=self.config.share, endpoint=self.config.endpoint,
        )  # fmt: skip
        self._remember(candidate)
        for old in self.folder.glob("step_*"):
            if str(old) not in served:
                shutil.rmtree(old)

    @property
    def _record(self) -> Path:
        return self.folder / "last.json"

    def _remember(self, candidate: Candidate) -> None:
        self._last = candidate
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self._record, json.dumps(asdict(candidate)))


def check_endpoint(config: RunConfig) -> None:
    """Check that the endpoint of `ppo.publishing` exists on the cluster that this process is connected to.

    Raises:
        NoEndpoint: it does not exist.
    """
    if config.ppo.publishing is not None:
        from rlhf_ray.serving.endpoint import gateway_of

        gateway_of(config.ppo.publishing.endpoint)


def endpoint_publishing(
    run: Run,
    config: PublishingConfig,
    roles: Roles,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
) -> EndpointPublishing:
    """The hook for a run's `ppo.publishing`. `prompts` are held out."""
    utility = utility_of(run.config)

    async def examine(step: int) -> Candidate:
        answers = await answer(roles, prompts[: config.prompts], tokenizer, utility)
        values = answers.rewards if answers.utilities is None else answers.utilities
        return Candidate(step, values.tolist(), answers.kl)

    async def save(version_folder: Path) -> None:
        await roles.policy.save_pretrained(version_folder)
        await asyncio.to_thread(run.push)

    def deploy(step: int, version_folder: Path, share: float) -> list[str]:
        from ray.serve.exceptions import RayServeException

        from rlhf_ray.serving.endpoint import Endpoint
        from rlhf_ray.serving.versions import Version

        version = Version(f"{run.config.name}-{step}", portable(version_folder))
        try:
            endpoint = Endpoint.attach(config.endpoint)
            # A run that is asked to stop does not wait for engines.
            endpoint.give_up = lambda: run.stop.made
            versions = endpoint.versions
            # A resumed run repeats steps, whose policy, the same bit for bit, may be served already.
            if version not in versions.alive:
                versions = endpoint.publish(version, share)
        except (RuntimeError, TimeoutError, RayServeException) as error:
            raise NotDeployed(str(error)) from error
        return [str(local(version.folder)) for version in versions.alive]

    return EndpointPublishing(config, run.folder.published, examine, save, deploy, run.events)
