"""The PPO stage: from models and prompts to a trained policy, from the start or from a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rlhf_ray.config import dump_config
from rlhf_ray.config.run import RunConfig
from rlhf_ray.data.datasets import Split, fitting, prompt_limit
from rlhf_ray.data.tokenize import encode_prompts
from rlhf_ray.driver import checkpointer
from rlhf_ray.driver.checkpointer import RunState, TrainingState
from rlhf_ray.driver.extras.discriminator import Discriminator
from rlhf_ray.driver.extras.endpoint_publishing import publishing
from rlhf_ray.driver.extras.ptx import encoded, to_learn_from, to_tell_apart
from rlhf_ray.driver.loop import PpoLoop
from rlhf_ray.driver.rollouts import PromptSource
from rlhf_ray.driver.run_logger import RunLogger
from rlhf_ray.driver.workers import Roles
from rlhf_ray.models.loading import load_tokenizer, replace_folder
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runtime.stopping import StopRequest


def find_checkpoint(folder: RunFolder, events: EventLog) -> tuple[Path, RunState] | None:
    """The newest whole checkpoint; damaged ones that were passed over become events."""
    return checkpointer.newest(folder.checkpoints, lambda reason: events.emit("fault", reason))


async def run_ppo(
    config: RunConfig,
    folder: RunFolder,
    roles: Roles,
    model: str,
    data: Split,
    events: EventLog,
    found: tuple[Path, RunState] | None,
    demonstrations: Split | None = None,
    stop: StopRequest | None = None,
    push: Callable[[], None] | None = None,
) -> None:
    """Train the policy, from the checkpoint `found` where there is one, and leave it in the run's `policy` folder.

    `data` are prompts; `demonstrations` are read where the config has a `ptx` or a discriminator; `push` takes checkpoints to a
    store.

    Raises:
        RunStopped: `stop` was asked for; there is a checkpoint, and no `policy` folder.
    """
    tokenizer = load_tokenizer(model)
    limit = prompt_limit(config.data)
    note = partial(events.emit, "drop")
    prompts = fitting(encode_prompts(tokenizer, data.train, limit), "prompts", limit, note)
    source = PromptSource(prompts, config.name, config.seed, config.ppo.samples_per_prompt)
    extra, imitation = None, None
    if config.ppo.algorithm.ptx or config.ppo.discriminator:
        dialogues = encoded(config, tokenizer, demonstrations, note)
        extra = to_learn_from(dialogues, config.seed) if config.ppo.algorithm.ptx else None
        if config.ppo.discriminator:
            shown = to_tell_apart(dialogues, config, note)
            imitation = Discriminator(config.ppo, roles.discriminator, shown, config.seed)
    state = TrainingState.initial(config.ppo.algorithm.kl)
    if found is not None:
        path, saved = found
        state = TrainingState.restored(saved)
        await _restore(roles, imitation, path)
        await roles.pool.sync_weights(state.step, roles.policy)
        events.emit("stage", f"ppo goes on after step {state.step}", checkpoint=path.name)
    digest = checkpointer.fingerprint(dump_config(config))
    resume_step = state.step if found else None
    keep = config.ppo.checkpoint.keep
    offering = None
    if config.ppo.publishing is not None:
        held_out = fitting(encode_prompts(tokenizer, data.held_out, limit), "held-out prompts", limit, note)
        offering = publishing(config, folder, roles, held_out, tokenizer, events, push, stop)
        await offering.begin(state.step)
    with RunLogger(
        folder, events, tokenizer, config.ppo.steps, keep, digest, resume_step, config.alerts, config.telemetry.wandb, push
    ) as journal:  # fmt: skip
        loop = PpoLoop(config.ppo, roles, source, state, journal, config.seed, extra, imitation, stop, offering)
        await loop.run()
    _publish_folder(folder, config.ppo.steps)


async def _restore(roles: Roles, imitation: Discriminator | None, path: Path) -> None:
    await roles.policy.load_checkpoint(path / "policy_learner")
    if roles.value is not None:
        await roles.value.load_checkpoint(path / "value_learner")
    if imitation is not None:
        await imitation.restore(path)


def _publish_folder(folder: RunFolder, step: int) -> None:
    """Copy the last checkpoint's Hugging Face folder to where people look for the policy."""
    temporary = folder.path / ".policy"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(folder.checkpoints / f"step_{step}" / "policy", temporary)
    replace_folder(temporary, folder.policy)
