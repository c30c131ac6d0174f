"""The PPO stage: from models and prompts to a trained policy, from the start or from a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config import dump_config
from rlhf_ray.data.datasets import fitting, prompt_limit
from rlhf_ray.data.tokenize import encode_prompts
from rlhf_ray.driver.checkpointer import Checkpointer, TrainingState, fingerprint, newest
from rlhf_ray.driver.extras.discriminator import Discriminator
from rlhf_ray.driver.extras.endpoint_publishing import endpoint_publishing
from rlhf_ray.driver.extras.ptx import Ptx, rollout_like_dialogues, training_dialogues, whole_dialogues
from rlhf_ray.driver.hooks import HookChain, LoopHook
from rlhf_ray.driver.loop import PpoLoop
from rlhf_ray.driver.rollouts import PromptSource, RolloutStream
from rlhf_ray.driver.run_logger import RunLogger
from rlhf_ray.driver.workers import Roles
from rlhf_ray.models.loading import load_tokenizer, replace_folder
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from rlhf_ray.stages.run import Run


def find_checkpoint(folder: RunFolder, events: EventLog) -> tuple[Path, TrainingState] | None:
    """The newest complete checkpoint; damaged ones that are skipped become events."""
    return newest(folder.checkpoints, lambda reason: events.emit("fault", reason))


async def run_ppo(
    run: Run, roles: Roles, found: tuple[Path, TrainingState] | None = None, hooks: Iterable[LoopHook] = ()
) -> None:
    """Train the policy, from the checkpoint `found` if there is one, and copy it to the run's `policy` folder.

    `hooks` are called after those of the config.

    Raises:
        RunStopped: the run was asked to stop; there is a checkpoint and no `policy` folder.
    """
    config, ppo, folder, events = run.config, run.config.ppo, run.folder, run.events
    assert run.data.prompts is not None
    tokenizer, limit = load_tokenizer(run.ppo_start), prompt_limit(config.data)
    encoded = encode_prompts(tokenizer, run.data.prompts.train, limit)
    prompts = fitting(encoded, "prompts", limit, run.note_dropped)
    source = PromptSource(prompts, config.name, config.seed, ppo.samples_per_prompt)
    chain = HookChain([*_configured_hooks(run, roles, tokenizer), *hooks])
    digest = fingerprint(dump_config(config))
    checkpointer = Checkpointer(folder.checkpoints, roles.learners, chain, ppo.checkpoint.keep, digest, run.push)
    state = TrainingState.initial(ppo.algorithm.kl)
    if found is not None:
        path, state = found
        await checkpointer.restore(path)
        await roles.pool.sync_weights(state.step, roles.policy)
        events.emit("stage", f"ppo goes on after step {state.step}", checkpoint=path.name)
    await chain.start(state.step)
    attempts = ppo.algorithm.dynamic_sampling.max_attempts if ppo.algorithm.dynamic_sampling else 1
    admission = state.admission(ppo.batch_size // ppo.samples_per_prompt, ppo.staleness, attempts)
    with RunLogger(folder, events, tokenizer, config, state.step if found else None) as logger:
        stream = RolloutStream(ppo, roles, source, admission, logger, run.stop)
        await PpoLoop(config, roles, stream, logger, checkpointer, chain.hooks).run(state)
    _copy_policy(folder, ppo.steps)


def _configured_hooks(run: Run, roles: Roles, tokenizer: PreTrainedTokenizerBase) -> list[LoopHook]:
    """The hooks that the config asks for, in the order in which they are called."""
    config, ppo = run.config, run.config.ppo
    hooks: list[LoopHook] = []
    if ppo.algorithm.ptx or ppo.discriminator:
        assert run.data.demonstrations is not None
        dialogues = training_dialogues(config, tokenizer, run.data.demonstrations, run.note_dropped)
        if ppo.algorithm.ptx:
            hooks.append(Ptx(ppo, whole_dialogues(dialogues, config.seed)))
        if ppo.discriminator:
            demonstrations = rollout_like_dialogues(dialogues, config, run.note_dropped)
            hooks.append(Discriminator(ppo, roles.learners["discriminator"], demonstrations, config.seed))
    if ppo.publishing is not None:
        assert run.data.prompts is not None
        limit = prompt_limit(config.data)
        encoded = encode_prompts(tokenizer, run.data.prompts.held_out, limit)
        held_out = fitting(encoded, "held-out prompts", limit, run.note_dropped)
        hooks.append(endpoint_publishing(run, ppo.publishing, roles, held_out, tokenizer))
    return hooks


def _copy_policy(folder: RunFolder, step: int) -> None:
    """Copy the policy of the last checkpoint to the run's `policy` folder."""
    temporary = folder.path / ".policy"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(folder.checkpoints / f"step_{step}" / "policy", temporary)
    replace_folder(temporary, folder.policy)
