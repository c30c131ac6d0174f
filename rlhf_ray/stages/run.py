"""A whole run: the stages in their order, in one folder, resumable.

Invariant: a stage that is complete is never done again; one that was interrupted goes on from its newest whole
checkpoint, whichever stage it is.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from rlhf_ray.config import RunConfig, dump_config
from rlhf_ray.config.changes import check_unchanged
from rlhf_ray.config.loading import ConfigError
from rlhf_ray.config.run import Stage
from rlhf_ray.data.datasets import Datasets, fitting, load_datasets, prompt_limit
from rlhf_ray.data.tokenize import encode_prompts
from rlhf_ray.driver.extras.endpoint_publishing import check_endpoint
from rlhf_ray.driver.run_logger import note_worker_event
from rlhf_ray.driver.workers import LEARNERS, ModelPaths, Roles
from rlhf_ray.models.loading import load_tokenizer, local_folder
from rlhf_ray.report import write_report
from rlhf_ray.runs.events import EventLog, read_events
from rlhf_ray.runs.run_folder import RunFolder, atomic_write
from rlhf_ray.runs.status import status_lines
from rlhf_ray.runs.storage.location import portable
from rlhf_ray.runs.storage.mirror import Mirror
from rlhf_ray.runs.storage.session import claim_run_folder
from rlhf_ray.runtime.cluster import JOB, connect
from rlhf_ray.runtime.placement import Placement, plan_placement
from rlhf_ray.runtime.stopping import RunStopped, StopRequest, stop_on_sigterm
from rlhf_ray.stages import evaluation, normalisation
from rlhf_ray.stages.checks import check_run
from rlhf_ray.stages.ppo import find_checkpoint, run_ppo
from rlhf_ray.stages.reward_model import run_reward_model
from rlhf_ray.stages.sft import base_model, run_sft
from rlhf_ray.stages.supervised import FitState
from rlhf_ray.telemetry.console import console
from rlhf_ray.telemetry.progress import StageProgress

COMMANDS: dict[Stage, str] = {"sft": "sft", "reward_model": "reward-model", "ppo": "ppo", "evaluation": "evaluate"}
"""The commands that do one stage of a run."""


@dataclass
class Run:
    """One run while it is being done."""

    config: RunConfig
    folder: RunFolder
    events: EventLog
    data: Datasets
    base: str
    stop: StopRequest
    mirror: Mirror | None = None
    """Of a folder on a store."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and write down that it began and ended; none begins in a run that is to stop."""
        self.stop.check()
        self.push()
        self.events.emit("stage", f"{name} begins")
        began = time.perf_counter()
        yield
        self.events.emit("stage", f"{name} ends", seconds=round(time.perf_counter() - began, 2))

    def push(self) -> None:
        """Wait until a store has everything that is in the folder: what comes next, on other nodes, may need it."""
        if self.mirror is not None:
            self.mirror.push()

    def note(self, message: str) -> None:
        """Write down what was left out of the data."""
        self.events.emit("drop", message)

    def kept(self, stage: str, fit: FitState) -> None:
        """Write down how a supervised stage ended."""
        why = f"{stage} stopped early, after step {fit.step}" if fit.stopped else f"{stage} took {fit.step} steps"
        best = f"the held-out loss was lowest, {fit.best_loss:.4g}, after step {fit.best_step}"
        self.events.emit("stage", f"{why}; {best}")

    @property
    def start(self) -> str:
        """The folder that PPO starts from."""
        named = self.config.ppo.policy_model
        if named is not None:
            return local_folder(named)
        return str(self.folder.sft) if "sft" in self.config.stages else self.base

    def paths(self) -> ModelPaths:
        """What the roles load."""
        source, value = self.config.ppo.reward.model, self.config.ppo.value_model
        reward: tuple[str, ...] = ()
        if source is not None:
            own = [str(self.folder.reward_member(m)) for m in range(1, self.config.reward_model.members + 1)]
            reward = tuple(map(local_folder, source.paths)) or tuple(own)
        teacher = self.config.ppo.teacher and local_folder(self.config.ppo.teacher.model)
        judge = self.config.ppo.discriminator
        judge = judge and (local_folder(judge.model) if judge.model else self.start)
        critic = local_folder(value) if value else (*reward, self.start)[0]
        return ModelPaths(self.start, critic, reward, teacher, judge)


def run(config: RunConfig, resume: bool = False, only: Stage | None = None) -> RunFolder:
    """Do every stage of a config, or only one of them; the folder that holds the results.

    Raises:
        ConfigError, DataError, NotAModel, RunFolderError, …: before anything starts, where the input is at fault.
        RunStopped: SIGTERM came; the stage that it interrupted has left a checkpoint.
    """
    check_run(config)
    with ExitStack() as held:
        folder, mirror = held.enter_context(claim_run_folder(config, resume or only is not None))
        events = held.enter_context(EventLog(folder.events))
        if mirror is not None:
            held.enter_context(mirror.running(partial(events.emit, "fault")))
        due = _due(config, folder, only)
        if folder.config.is_file():
            check_unchanged(folder.config.read_text(), config)
        atomic_write(folder.config, dump_config(config))
        data = load_datasets(config.data, folder.path, config.seed, lambda message: events.emit("drop", message))
        base = base_model(config, folder, data)
        watched = status_lines(folder) if JOB in os.environ else nullcontext()
        with connect(config.cluster, config.name), stop_on_sigterm() as stop, watched:
            if "ppo" in due:
                check_endpoint(config)
            current = Run(config, folder, events, data, base, stop, mirror)
            try:
                _supervised_stages(current, due)
                if {"ppo", "evaluation"} & set(due):
                    asyncio.run(_reinforcement_stages(current, due))
            except RunStopped as stopped:
                events.emit("stage", str(stopped))
                write_report(folder)
                raise
        write_report(folder)
    return folder


def _due(config: RunConfig, folder: RunFolder, only: Stage | None) -> tuple[Stage, ...]:
    """The stages to do now: those of the run that are not complete; of these only one, if so asked.

    Raises:
        ConfigError: the one that is asked for is not a stage of this run, or is to start from one that is not complete.
    """
    complete = {
        "sft": (folder.sft / "config.json").is_file(),
        "reward_model": all(
            (folder.reward_member(member) / "config.json").is_file()
            for member in range(1, config.reward_model.members + 1)
        ),
        "ppo": folder.policy.is_dir(),
    }
    open_stages = tuple(stage for stage in config.stages if not complete.get(stage, False))
    if only is None:
        return open_stages
    if only not in config.stages:
        raise ConfigError(f"{only} is not among the stages of {config.name}, {', '.join(config.stages)}")
    before = open_stages[: open_stages.index(only)] if only in open_stages else ()
    if before:
        raise ConfigError(
            f"stage {only} starts from what {', '.join(before)} of this run leaves, which is not there yet; do "
            f"`rlhf-ray {COMMANDS[before[0]]}` first, or the whole run by `rlhf-ray run`"
        )
    return tuple(stage for stage in open_stages if stage == only)


def _supervised_stages(current: Run, due: Sequence[Stage]) -> None:
    config, folder = current.config, current.folder
    if "sft" in due:
        with current.stage("sft"):
            current.kept(
                "sft", run_sft(config, folder, current.base, current.data.demonstrations, current.note, current.stop)
            )
    if "reward_model" in due:
        with current.stage("reward_model"):
            fit = run_reward_model(config, folder, current.start, current.data, current.note, current.stop)
            current.kept("reward_model", fit)


async def _reinforcement_stages(current: Run, due: Sequence[Stage]) -> None:
    """PPO and evaluation, on the same actors."""
    config, ppo = current.config, current.config.ppo
    found = find_checkpoint(current.folder, current.events) if "ppo" in due else None
    roles_needed = config.roles
    if "ppo" not in due:
        roles_needed = {role: w for role, w in roles_needed.items() if role not in (*LEARNERS, "teacher")}
    plan = plan_placement(roles_needed, ppo.placement.colocate, ppo.placement.strategy)
    with Placement(plan, roles_needed, ppo.placement.timeout_s, current.stop.check) as placement:
        with current.stage("start"), console.status("starting rollout, reward, reference and learner actors"):
            starting = Roles.start(
                config, current.paths(), placement, lambda event: note_worker_event(current.events, event)
            )
            roles = await current.stop.or_result(starting)
        try:
            await current.stop.or_result(_normalise(current, roles))
            if "ppo" in due:
                with current.stage("ppo"):
                    await run_ppo(
                        config, current.folder, roles, current.start, current.data.prompts, current.events, found,
                        current.data.demonstrations, current.stop, current.push,
                    )  # fmt: skip
            if "evaluation" in due:
                await current.stop.or_result(_evaluate(current, roles))
        finally:
            await roles.close()


def _silent(message: str) -> None:
    """For prompts whose loss PPO will write down."""


async def _normalise(current: Run, roles: Roles) -> None:
    """Once in a run: make the reward of its reward model mean 0 and std 1 on answers of the policy it starts from."""
    source, folder = current.config.ppo.reward.model, current.folder
    members = [folder.reward_member(member) for member in range(1, current.config.reward_model.members + 1)]
    if not normalisation.due(source, members):
        return
    with current.stage("normalisation"):
        limit = prompt_limit(current.config.data)
        records = current.data.prompts.train[: source.normalise_on]
        prompts = fitting(encode_prompts(load_tokenizer(current.start), records, limit), "prompts", limit, _silent)
        statistics = await normalisation.normalise_reward(source, members, roles, prompts)
    said = "; ".join(f"mean {mean:.3g}, std {std:.3g}" for mean, std in statistics)
    current.events.emit("stage", f"rewards are normalised on the policy's answers: {said}")


async def _evaluate(current: Run, roles: Roles) -> None:
    """Answer held-out prompts with every policy there is, and write what came of it."""
    config, folder = current.config, current.folder
    tokenizer = load_tokenizer(current.start)
    limit = prompt_limit(config.data)
    encoded = encode_prompts(tokenizer, current.data.prompts.held_out, limit)
    prompts = fitting(encoded, "held-out prompts", limit, current.note)
    prompts = prompts[: config.evaluation.prompts]
    policies = {"base": current.base, "sft": current.start, "ppo": str(folder.policy)}
    answers: dict[str, evaluation.Answers] = {}
    with (
        current.stage("evaluation"),
        StageProgress(folder.name, "evaluation", len(policies), plain_every=1) as progress,
    ):
        for number, (name, path) in enumerate(policies.items(), start=1):
            if name != "ppo" or folder.policy.is_dir():
                await roles.pool.load_folder(portable(path), -number)
                answers[name] = await evaluation.answer(roles, prompts, tokenizer, evaluation.utility_of(config))
            progress.update(number)
    pairs = current.data.pairs.held_out if config.data.simulate else None
    accuracy, ceiling = evaluation.accuracy_of_reward_model(folder, pairs)
    summary = evaluation.summarise(answers, accuracy, ceiling, _recorded_seconds(current))
    evaluation.write_samples(folder.evaluation_samples, prompts, answers)
    atomic_write(folder.evaluation, json.dumps(summary, indent=1) + "\n")


def _recorded_seconds(current: Run) -> dict[str, float]:
    """Of stages done in earlier attempts, too."""
    ended = (e for e in read_events(current.folder.events) if e.kind == "stage" and "seconds" in e.fields)
    return {event.message.removesuffix(" ends"): event.fields["seconds"] for event in ended}
