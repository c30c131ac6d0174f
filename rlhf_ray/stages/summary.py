"""What the console shows before a run (its placement) and after it (the results and their paths)."""

from __future__ import annotations

import json
from shlex import quote

from rich.table import Table

from rlhf_ray.config.run import RunConfig
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runtime.placement import plan_placement
from rlhf_ray.telemetry.console import console


def print_placement(config: RunConfig) -> None:
    """Print the resources that the stages need."""
    for stage, settings in (("sft", config.sft), ("reward_model", config.reward_model)):
        if stage in config.stages:
            workers = settings.learner.workers
            console.print(f"{stage}: {workers.count} × ({workers.cpus:g} CPU, {workers.gpus:g} GPU)", highlight=False)
    if {"ppo", "evaluation"} & set(config.stages):
        console.print(_bundles(config))


def _bundles(config: RunConfig) -> Table:
    """The bundles of the PPO stage and their actors."""
    placement = config.ppo.placement
    plan = plan_placement(config.roles, placement.colocate, placement.strategy)
    table = Table(title=f"placement group of the PPO stage, strategy {plan.strategy}", title_justify="left")
    table.add_column("bundle", justify="right")
    table.add_column("resources")
    table.add_column("actors")
    for index, bundle in enumerate(plan.bundles):
        actors = [f"{role}[{number}]" for (role, number), slot in plan.slots.items() if slot == index]
        table.add_row(str(index), _resources(bundle), ", ".join(actors))
    table.add_section()
    table.add_row("all", _resources(plan.totals), f"{len(plan.slots)} actors")
    return table


def print_summary(folder: RunFolder) -> None:
    """Print the results and where they are."""
    if folder.evaluation.is_file():
        console.print(_comparison(json.loads(folder.evaluation.read_text())))
    policy = next((p for p in (folder.policy, folder.sft) if p.is_dir()), None)
    for what, path in (("policy", policy), ("rewards", folder.reward_model)):
        if path is not None and path.is_dir():
            console.print(f"{what:8} {path}", highlight=False, soft_wrap=True)
    console.print(f"report   {folder.report}", highlight=False, soft_wrap=True)
    console.print(f"curves   tensorboard --logdir {quote(str(folder.tensorboard))}", highlight=False, soft_wrap=True)
    if policy is not None:
        console.print(f"next     rlhf-ray serve {quote(str(folder.path))}", highlight=False, soft_wrap=True)


def _comparison(result: dict) -> Table:
    table = Table(title="held-out prompts", title_justify="left")
    for column in ("", "base", "SFT", "PPO"):
        table.add_column(column, justify="left" if not column else "right")
    for label, key in (("hidden utility", "utility"), ("learned reward", "reward"), ("tokens", "length")):
        row = [result[key].get(name) for name in ("base", "sft", "ppo")]
        if any(value is not None for value in row):
            table.add_row(label, *(_number(value) for value in row))
    if result["win_rate_vs_sft"] is not None:
        low, high = result["win_rate_interval"]
        table.add_row("win rate against SFT", "", "", f"{result['win_rate_vs_sft']:.1%} ({low:.1%}–{high:.1%})")
    elif result["win_rate_vs_sft_by_reward"] is not None:
        table.add_row("win rate by learned reward", "", "", f"{result['win_rate_vs_sft_by_reward']:.1%}")
    table.add_row("KL to SFT, nats", "", "", _number(result["kl_sequence"]))
    accuracy, ceiling = result["reward_model_accuracy"], result["reward_model_accuracy_ceiling"]
    if accuracy is not None:
        of = f" of at most {ceiling:.1%}" if ceiling else ""
        table.add_row("reward model accuracy", "", "", f"{accuracy:.1%}{of}")
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _resources(bundle: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
