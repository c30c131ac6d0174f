"""Places the actors of a run in one Ray placement group.

Invariants: all actors are placed together or not at all, so a run never starts with some of its roles; colocated roles share one
bundle per index and its resources (fractional GPUs).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.config.section import Workers
from rlhf_ray.errors import InputError

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


class NotEnoughResources(InputError, RuntimeError):
    """The cluster cannot hold the run's actors."""


@dataclass(frozen=True)
class PlacementPlan:
    """The bundles to reserve, and the bundle of every (role, index)."""

    bundles: tuple[dict[str, float], ...]
    slots: Mapping[tuple[str, int], int]
    strategy: Strategy

    @property
    def totals(self) -> dict[str, float]:
        """The sum of all bundles, by resource."""
        names = sorted({name for bundle in self.bundles for name in bundle})
        return {name: round(sum(b.get(name, 0.0) for b in self.bundles), 6) for name in names}


def plan_placement(
    roles: Mapping[str, Workers], colocate: Sequence[Sequence[str]] = (), strategy: Strategy = "PACK"
) -> PlacementPlan:
    """Plan one bundle for each actor; the roles of a `colocate` group share one bundle for each index. Pure."""
    home = {role: group[0] for group in colocate for role in group}
    bundles: list[dict[str, float]] = []
    slots: dict[tuple[str, int], int] = {}
    for role, workers in roles.items():
        for index in range(workers.count):
            shared = slots.get((f"@{home.get(role)}", index))
            if shared is None:
                shared = len(bundles)
                bundles.append({})
                if role in home:
                    slots[(f"@{home[role]}", index)] = shared
            slots[(role, index)] = shared
            for name, amount in _demand(workers).items():
                bundles[shared][name] = round(bundles[shared].get(name, 0.0) + amount, 6)
    return PlacementPlan(tuple(bundles), {k: v for k, v in slots.items() if not k[0].startswith("@")}, strategy)


def _demand(workers: Workers) -> dict[str, float]:
    # Ray refuses empty bundles, so an actor without resources reserves a tiny share of a CPU.
    demand = {"CPU": max(workers.cpus, 0.001), "GPU": workers.gpus, **workers.resources}
    return {name: amount for name, amount in demand.items() if amount > 0}


class Placement:
    """A reserved plan, as a context manager. Leaving it removes the placement group and kills the actors that still run in it."""

    def __init__(
        self,
        plan: PlacementPlan,
        roles: Mapping[str, Workers],
        timeout_s: float,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Wait until the resources are free. Meanwhile `check` is called every second; its error ends the waiting."""
        self.plan = plan
        self.roles = roles
        self._check_totals()
        self.group: PlacementGroup = placement_group(list(plan.bundles), strategy=plan.strategy)
        if not self._wait(timeout_s, check):
            remove_placement_group(self.group)
            raise NotEnoughResources(
                f"no node (or set of nodes) could hold the bundles {list(plan.bundles)} with strategy {plan.strategy} "
                f"within {timeout_s:.0f} s; free now: {ray.available_resources()}. Lower workers.cpus/gpus, or add nodes"
            )

    def _wait(self, timeout_s: float, check: Callable[[], None]) -> bool:
        deadline = time.monotonic() + timeout_s
        try:
            while not (ready := self.group.wait(min(1.0, max(0.0, deadline - time.monotonic())))):
                if time.monotonic() >= deadline:
                    break
                check()
        except BaseException:
            remove_placement_group(self.group)
            raise
        return ready

    def options(self, role: str, index: int) -> dict[str, Any]:
        """The Ray options of actor `index` of a role: resources, bundle, environment."""
        workers = self.roles[role]
        return {
            "num_cpus": max(workers.cpus, 0.001),
            "num_gpus": workers.gpus,
            "resources": dict(workers.resources),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self.group, placement_group_bundle_index=self.plan.slots[(role, index)]
            ),
            "runtime_env": {"env_vars": {"HF_HUB_OFFLINE": "1", **workers.process_environment}},
        }

    def _check_totals(self) -> None:
        """Compare the plan with the cluster's total resources, to fail without waiting."""
        have = ray.cluster_resources()
        short = {n: (need, have.get(n, 0.0)) for n, need in self.plan.totals.items() if need > have.get(n, 0.0) + 1e-6}
        if short:
            listing = ", ".join(
                f"{name}: {need:g} needed, {got:g} in the cluster" for name, (need, got) in short.items()
            )
            raise NotEnoughResources(
                f"the roles need more than the cluster has ({listing}); lower the roles' workers.count, cpus or gpus, "
                "or join more nodes. `--dry-run` prints each bundle"
            )

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, *_: object) -> None:
        remove_placement_group(self.group)
