"""Placement plans, and one real placement group."""

from __future__ import annotations

import pytest

from rlhf_ray.config.section import Workers
from rlhf_ray.runtime.placement import NotEnoughResources, Placement, plan_placement


def test_one_bundle_for_each_actor():
    plan = plan_placement({"policy": Workers(count=2, cpus=1.5), "reward": Workers(cpus=0.5, gpus=0.25)})
    assert plan.bundles == ({"CPU": 1.5}, {"CPU": 1.5}, {"CPU": 0.5, "GPU": 0.25})
    assert plan.slots == {("policy", 0): 0, ("policy", 1): 1, ("reward", 0): 2}
    assert plan.totals == {"CPU": 3.5, "GPU": 0.25}


def test_colocated_roles_share_a_bundle_for_each_index():
    roles = {
        "policy": Workers(count=2, cpus=1, gpus=0.5),
        "rollout": Workers(count=3, cpus=2, gpus=0.5),
        "reward": Workers(cpus=1),
    }
    plan = plan_placement(roles, [["rollout", "policy"]])
    assert [plan.slots[("policy", i)] for i in range(2)] == [plan.slots[("rollout", i)] for i in range(2)] == [0, 1]
    assert plan.bundles[0] == plan.bundles[1] == {"CPU": 3.0, "GPU": 1.0}
    assert plan.bundles[plan.slots[("rollout", 2)]] == {"CPU": 2.0, "GPU": 0.5}, "one more than it could share with"
    assert plan.totals == {"CPU": 9.0, "GPU": 2.5}
    assert set(plan.slots) == {(role, index) for role, workers in roles.items() for index in range(workers.count)}


def test_two_groups_do_not_mix_and_absent_roles_do_not_matter():
    roles = {name: Workers(cpus=1) for name in ("policy", "rollout", "reward", "reference")}
    plan = plan_placement(roles, [["rollout", "policy", "value"], ["reward", "reference"]])
    assert plan.slots == {("policy", 0): 0, ("rollout", 0): 0, ("reward", 0): 1, ("reference", 0): 1}


def test_custom_resources_and_actors_without_resources():
    plan = plan_placement({"rollout": Workers(cpus=0, resources={"rollout_node": 1})})
    assert plan.bundles == ({"CPU": 0.001, "rollout_node": 1},), "Ray refuses empty bundles"


def test_fractions_add_up_exactly():
    plan = plan_placement({"reward": Workers(count=10, cpus=0.1, gpus=0.1)})
    assert plan.totals == {"CPU": 1.0, "GPU": 1.0}


ROLES = {
    "policy": Workers(count=2, cpus=0.5, threads=3, env={"MINE": "yes", "HF_HUB_OFFLINE": "0"}),
    "rollout": Workers(count=2, cpus=0.5),
}


def test_actors_run_where_they_were_placed(ray_cluster):
    """Actors run in their bundles with their threads and environment, and the resources are released afterwards."""
    import ray
    from ray.util.placement_group import placement_group_table

    class Look:
        def environment(self) -> tuple[str, ...]:
            import os

            return tuple(os.environ[name] for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MINE", "HF_HUB_OFFLINE"))

        def bundle(self) -> str:
            import ray

            return ray.util.get_current_placement_group().id.hex()

    plan = plan_placement(ROLES, [["policy", "rollout"]])
    with Placement(plan, ROLES, timeout_s=30) as placement:
        actor = ray.remote(Look).options(**placement.options("policy", 1)).remote()
        assert ray.get(actor.environment.remote()) == ("3", "passive", "yes", "0"), "a role's own environment wins"
        assert ray.get(actor.bundle.remote()) == placement.group.id.hex()
        assert placement_group_table(placement.group)["bundles"] == {0: {"CPU": 1.0}, 1: {"CPU": 1.0}}
    assert placement_group_table(placement.group)["state"] == "REMOVED"


def test_more_than_the_cluster_has_is_refused_at_once(ray_cluster):
    roles = {"policy": Workers(count=3, cpus=100), "rollout": Workers(gpus=1)}
    with pytest.raises(NotEnoughResources) as caught:
        Placement(plan_placement(roles), roles, timeout_s=300)
    assert "CPU: 300.25 needed" in str(caught.value) and "GPU: 1 needed, 0 in the cluster" in str(caught.value)


def test_bundles_that_no_node_can_hold_are_refused_after_the_wait(ray_cluster):
    """Two bundles need different nodes and there is only one node. Nothing stays reserved."""
    import ray

    roles = {"policy": Workers(count=2, cpus=0.5)}
    with pytest.raises(NotEnoughResources, match="with strategy STRICT_SPREAD within 1 s"):
        Placement(plan_placement(roles, strategy="STRICT_SPREAD"), roles, timeout_s=1)
    with Placement(plan_placement(roles), roles, timeout_s=30):
        assert ray.is_initialized()
