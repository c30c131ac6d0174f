"""A whole run: the stages in order, in one folder, resumable.

Invariant: a complete stage is never repeated, and an interrupted one continues from its newest whole checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf_ray.config import RunConfig, dump_config
from rlhf_ray.config.changes import check_unchanged
from rlhf_ray.config.loading import ConfigError
from rlhf_ray.config.run import Stage
from rlhf_ray.data.datasets import Datasets, fitting, load_datasets, prompt_limit
from rlhf_ray.data.tokenize import encode_prompts
from rlhf_ray.driver.answers import utility_of
from rlhf_ray.driver.extras.endpoint_publishing import check_endpoint
from rlhf_ray.driver.hooks import LoopHook
from rlhf_ray.driver.run_logger import note_worker_event
from rlhf_ray.driver.workers import ModelPaths, Roles, start_workers
from rlhf_ray.models.loading import load_tokenizer, local_folder
from rlhf_ray.report import write_report
from rlhf_ray.roles import ROLES
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder, atomic_write
from rlhf_ray.runs.status import status_lines
from rlhf_ray.runs.storage.mirror import Mirror
from rlhf_ray.runs.storage.session import claim_run_folder
from rlhf_ray.runtime.cluster import JOB, connect
from rlhf_ray.runtime.placement import Placement, plan_placement
from rlhf_ray.runtime.stopping import RunStopped, StopRequest, run_coroutine, stop_on_sigterm
from rlhf_ray.stages import evaluation
from rlhf_ray.stages.checks import check_run
from rlhf_ray.stages.ppo import find_checkpoint, run_ppo
from rlhf_ray.stages.reward_model import needs_normalising, normalise_reward, run_reward_model
from rlhf_ray.stages.sft import base_model, run_sft
from rlhf_ray.stages.supervised_job import FitState
from rlhf_ray.telemetry.console import console

COMMANDS: dict[Stage, str] = {"sft": "sft", "reward_model": "reward-model", "ppo": "ppo", "evaluation": "evaluate"}
"""The command that does each stage alone."""


@dataclass
class Run:
    """A run in progress."""

    config: RunConfig
    folder: RunFolder
    events: EventLog
    data: Datasets
    base: str
    """The model folder that the first stage starts from."""
    stop: StopRequest
    mirror: Mirror | None = None
    """Copies the folder to a store, if the config names one."""
    hooks: Sequence[LoopHook] = ()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and record its begin and end. Raises RunStopped if the run is to stop."""
        self.stop.check()
        self.push()
        self.events.emit("stage", f"{name} begins")
        began = time.perf_counter()
        yield
        self.events.emit("stage", f"{name} ends", seconds=round(time.perf_counter() - began, 2))

    def push(self) -> None:
        """Wait until the store has the whole folder, which the next stage may read on other nodes."""
        if self.mirror is not None:
            self.mirror.push()

    def note_dropped(self, message: str) -> None:
        """Record which data was left out."""
        self.events.emit("drop", message)

    def note_fit(self, stage: str, fit: FitState) -> None:
        """Record how a supervised stage ended."""
        steps = f"{stage} stopped early, after step {fit.step}" if fit.stopped else f"{stage} took {fit.step} steps"
        best = f"the held-out loss was lowest, {fit.best_loss:.4g}, after step {fit.best_step}"
        self.events.emit("stage", f"{steps}; {best}")

    @property
    def ppo_start(self) -> str:
        """The model folder that PPO starts from."""
        if (named := self.config.ppo.policy_model) is not None:
            return local_folder(named)
        return str(self.folder.sft) if "sft" in self.config.stages else self.base

    @property
    def reward_members(self) -> list[Path]:
        """The folders of the run's own reward models."""
        return [self.folder.reward_member(member) for member in range(1, self.config.reward_model.members + 1)]

    def model_paths(self) -> ModelPaths:
        """The model folders that the roles load."""
        ppo = self.config.ppo
        reward: tuple[str, ...] = ()
        if ppo.reward.model is not None:
            reward = tuple(map(local_folder, ppo.reward.model.paths)) or tuple(map(str, self.reward_members))
        value = local_folder(ppo.value_model) if ppo.value_model else (*reward, self.ppo_start)[0]
        discriminator = None
        if ppo.discriminator:
            discriminator = local_folder(ppo.discriminator.model) if ppo.discriminator.model else self.ppo_start
        teacher = local_folder(ppo.teacher.model) if ppo.teacher else None
        return ModelPaths(self.ppo_start, value, reward, teacher, discriminator)


def run(
    config: RunConfig, resume: bool = False, only: Stage | None = None, hooks: Sequence[LoopHook] = ()
) -> RunFolder:
    """Do every stage of a config, or only one of them; returns the folder with the results.

    It may be called where an event loop runs already, such as in a notebook.

    Args:
        resume: continue a run that was interrupted.
        hooks: objects with methods that the PPO loop calls (see `driver.hooks`).

    Raises:
        ConfigError, DataError, NotAModel, RunFolderError, …: the input is wrong; raised before anything starts.
        RunStopped: SIGTERM arrived; the interrupted stage has saved a checkpoint.
    """
    check_run(config)
    with ExitStack() as held:
        folder, mirror = held.enter_context(claim_run_folder(config, resume or only is not None))
        events = held.enter_context(EventLog(folder.events))
        if mirror is not None:
            held.enter_context(mirror.running(partial(events.emit, "fault")))
        due = _stages_due(config, folder, only)
        if folder.config.is_file():
            check_unchanged(folder.config.read_text(), config)
        atomic_write(folder.config, dump_config(config))
        data = load_datasets(config.data, folder.path, config.seed, lambda message: events.emit("drop", message))
        base = base_model(config, folder, data)
        watched = status_lines(folder) if JOB in os.environ else nullcontext()
        with connect(config.cluster, config.name), stop_on_sigterm() as stop, watched:
            if "ppo" in due:
                check_endpoint(config)
            current = Run(config, folder, events, data, base, stop, mirror, hooks)
            try:
                _supervised_stages(current, due)
                if {"ppo", "evaluation"} & set(due):
                    run_coroutine(_reinforcement_stages(current, due))
            except RunStopped as stopped:
                events.emit("stage", str(stopped))
                write_report(folder)
                raise
        write_report(folder)
    return folder


def _stages_due(config: RunConfig, folder: RunFolder, only: Stage | None) -> tuple[Stage, ...]:
    """The stages of the run that are not complete, or of these only the one that is asked for.

    Raises:
        ConfigError: the stage `only` is not one of this run, or needs an earlier one that is not complete.
    """
    members = range(1, config.reward_model.members + 1)
    complete = {
        "sft": (folder.sft / "config.json").is_file(),
        "reward_model": all((folder.reward_member(member) / "config.json").is_file() for member in members),
        "ppo": folder.policy.is_dir(),
    }
    remaining = tuple(stage for stage in config.stages if not complete.get(stage, False))
    if only is None:
        return remaining
    if only not in config.stages:
        raise ConfigError(f"{only} is not among the stages of {config.name}, {', '.join(config.stages)}")
    before = remaining[: remaining.index(only)] if only in remaining else ()
    if before:
        raise ConfigError(
            f"stage {only} needs the results of {', '.join(before)}, which this run does not have yet; do "
            f"`rlhf-ray {COMMANDS[before[0]]}` first, or the whole run by `rlhf-ray run`"
        )
    return tuple(stage for stage in remaining if stage == only)


def _supervised_stages(current: Run, due: Sequence[Stage]) -> None:
    config, folder, data, note, stop = current.config, current.folder, current.data, current.note_dropped, current.stop
    if "sft" in due:
        assert data.demonstrations is not None
        with current.stage("sft"):
            current.note_fit("sft", run_sft(config, folder, current.base, data.demonstrations, note, stop))
    if "reward_model" in due:
        with current.stage("reward_model"):
            current.note_fit("reward_model", run_reward_model(config, folder, current.ppo_start, data, note, stop))


async def _reinforcement_stages(current: Run, due: Sequence[Stage]) -> None:
    """PPO and evaluation, on the same actors."""
    config, ppo = current.config, current.config.ppo
    found = find_checkpoint(current.folder, current.events) if "ppo" in due else None
    roles_needed = config.roles
    if "ppo" not in due:
        roles_needed = {role: workers for role, workers in roles_needed.items() if ROLES[role].evaluates}
    plan = plan_placement(roles_needed, ppo.placement.colocate, ppo.placement.strategy)
    with Placement(plan, roles_needed, ppo.placement.timeout_s, current.stop.check) as placement:
        with current.stage("start"), console.status("starting rollout, reward, reference and learner actors"):
            on_event = partial(note_worker_event, current.events)
            starting = start_workers(config, current.model_paths(), placement, on_event)
            roles = await current.stop.or_result(starting)
        try:
            await current.stop.or_result(_normalise(current, roles))
            if "ppo" in due:
                with current.stage("ppo"):
                    await run_ppo(current, roles, found, current.hooks)
            if "evaluation" in due:
                await current.stop.or_result(_evaluate(current, roles))
        finally:
            await roles.close()


async def _normalise(current: Run, roles: Roles) -> None:
    """Normalise the reward of the run's own reward model on the policy's answers, once in a run."""
    source, members = current.config.ppo.reward.model, current.reward_members
    if source is None or not needs_normalising(source, members):
        return
    assert current.data.prompts is not None
    with current.stage("normalisation"):
        limit = prompt_limit(current.config.data)
        records = current.data.prompts.train[: source.normalise_on]
        encoded = encode_prompts(load_tokenizer(current.ppo_start), records, limit)
        prompts = fitting(encoded, "prompts", limit, lambda _: None)  # PPO records which prompts are left out
        statistics = await normalise_reward(source, members, roles, prompts)
    figures = "; ".join(f"mean {mean:.3g}, std {std:.3g}" for mean, std in statistics)
    current.events.emit("stage", f"rewards are normalised on the policy's answers: {figures}")


async def _evaluate(current: Run, roles: Roles) -> None:
    """Answer held-out prompts with every policy of the run, and write the comparison."""
    config, folder, data = current.config, current.folder, current.data
    assert data.prompts is not None
    tokenizer, limit = load_tokenizer(current.ppo_start), prompt_limit(config.data)
    encoded = encode_prompts(tokenizer, data.prompts.held_out, limit)
    prompts = fitting(encoded, "held-out prompts", limit, current.note_dropped)[: config.evaluation.prompts]
    policies = {"base": current.base, "sft": current.ppo_start}
    if folder.policy.is_dir():
        policies["ppo"] = str(folder.policy)
    with current.stage("evaluation"):
        utility = utility_of(config)
        answers = await evaluation.answer_with_each(roles, policies, prompts, tokenizer, utility, folder.name)
    pairs = data.pairs.held_out if config.data.simulate and data.pairs is not None else None
    evaluation.write_results(folder, prompts, answers, pairs)
