"""New versions of the policy for an endpoint, while training goes on: only one that is better than what was published before.

Invariants: all candidates answer the same prompts with the same seeds; a candidate is compared with the last one that really
reached the endpoint, also after a resume; training does not wait for the engines of a version, and an endpoint that fails costs
the run nothing but a fault in its events.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from ray.exceptions import RayError
from transformers import PreTrainedTokenizerBase

from rlhf_ray.algorithms.statistics import Share, win_rate
from rlhf_ray.config.run import RunConfig
from rlhf_ray.config.serving import PublishingConfig
from rlhf_ray.driver.workers import Roles
from rlhf_ray.errors import InputError
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder, atomic_write
from rlhf_ray.runs.storage.location import local, portable
from rlhf_ray.runtime.stopping import StopRequest
from rlhf_ray.stages.evaluation import answer, utility_of
from rlhf_ray.types import Prompt


class NotDeployed(RuntimeError):
    """An endpoint did not take a version; it serves what it served before."""


@dataclass(frozen=True)
class Candidate:
    """A policy and how good it is."""

    step: int
    values: Sequence[float]
    """Utility, or else reward, of its answer to each prompt; NaN where it is not known."""
    kl: float | None
    """Nats per response, to the reference."""


Examine = Callable[[int], Awaitable[Candidate]]
"""Looks at the policy that the rollout workers have, which is that of a step."""
Save = Callable[[Path], Awaitable[None]]
"""Writes the learner's policy as a Hugging Face folder."""
Deploy = Callable[[int, Path, float], Sequence[str]]
"""(step, folder, share of the traffic) → the folders that the endpoint serves now. Blocks until its engines answer; raises
NotDeployed, InputError or RayError."""


class Publishing:
    """Decides at some steps whether the policy goes to the endpoint, and takes it there."""

    def __init__(
        self, config: PublishingConfig, folder: Path, examine: Examine, save: Save, deploy: Deploy, events: EventLog
    ) -> None:
        """`folder`: where versions are kept as long as they are served, and what is known of the last one."""
        self.config, self.folder, self.events = config, folder, events
        self.examine, self.save, self.deploy = examine, save, deploy
        self._last: Candidate | None = None
        self._deploying: asyncio.Task[None] | None = None

    async def begin(self, step: int) -> None:
        """Take up what was published last, or the policy of now as what the first candidate must be better than."""
        if self._record.is_file():
            self._last = Candidate(**json.loads(self._record.read_text()))
        else:
            self._remember(await self.examine(step))

    async def offer(self, step: int) -> dict[str, float]:
        """Publish the policy if this is a step for that and it is better; the metrics of the comparison."""
        if step % self.config.every:
            return {}
        if self._deploying is not None and not self._deploying.done():
            self.events.emit(
                "warning", f"the policy of step {step} was not looked at: the last version is still starting"
            )
            return {}
        await self.settle()
        candidate = await self.examine(step)
        won = win_rate(np.asarray(candidate.values), np.asarray(self._last.values))
        if won is None:
            return {}
        if won.low > self.config.better_than and not self._too_far(candidate):
            folder = self.folder / f"step_{step}"
            await self.save(folder)
            self._deploying = asyncio.create_task(self._publish(candidate, folder, won))
        return {"publishing/win_rate": won.value, "publishing/win_rate_low": won.low}

    async def settle(self) -> None:
        """Wait for the engines of a version that are starting."""
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

    async def _publish(self, candidate: Candidate, folder: Path, won: Share) -> None:
        try:
            served = await asyncio.to_thread(self.deploy, candidate.step, folder, self.config.share)
        except (NotDeployed, InputError, RayError) as error:
            self.events.emit("fault", f"the policy of step {candidate.step} was not published: {error}")
            shutil.rmtree(folder)
            return
        since = "the run began with" if self._last.step == 0 else f"of step {self._last.step}"
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
