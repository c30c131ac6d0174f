"""The table of roles: everything it names exists, and what is derived from it is what users see."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlhf_ray.config.ppo import PlacementConfig, PpoConfig
from rlhf_ray.learner.actor import LearnerModel
from rlhf_ray.roles import ROLES, busy_phases, status_labels


@pytest.mark.parametrize("role", ROLES.values(), ids=list(ROLES))
def test_what_an_entry_names_exists(role):
    assert isinstance(role.load("actor"), type) and callable(role.load("start"))
    assert role.name in PpoConfig.model_fields
    assert (role.kind == "learner") == bool(role.model)
    if role.model:
        assert isinstance(role.load("model"), LearnerModel)


def test_what_is_derived():
    assert PlacementConfig(colocate=[list(ROLES)]).colocate == [list(ROLES)]
    assert status_labels() == {
        "Learner": "learner", "RolloutWorker": "rollout", "RewardWorker": "reward", "TeacherWorker": "teacher",
        "ReferenceWorker": "reference",
    }  # fmt: skip
    phases = {kind: set(names) for kind, names in busy_phases().items()}
    assert phases == {
        "rollout": {"rollout"}, "scoring": {"scoring"},
        "learner": {"preparation", "update", "publication", "discriminator"},
    }  # fmt: skip


def test_a_config_is_read_without_ray_and_torch():
    code = "import sys, rlhf_ray.config.run, rlhf_ray.roles; print({'ray', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
