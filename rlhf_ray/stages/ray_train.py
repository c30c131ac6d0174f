"""Ray Train's trainer, without what cannot work on a cluster of one run."""

from __future__ import annotations

import os
from typing import Any

from ray._private.worker import get_dashboard_url
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR, HEALTH_CHECK_INTERVAL_S_ENV_VAR

POLL_S = "0.5"
"""How often Ray Train's controller looks at its ranks; its own default of 2 s is how late it sees the end of a stage."""


class StageTrainer(TorchTrainer):
    """A private cluster has no dashboard. There placement groups end with the cluster, and Ray Train's cleaner of them, which
    asks the dashboard whether the controller lives, would wait for it 12 s at the end of each stage, and print a traceback;
    and no node is told beforehand that it is to go, so nobody need watch for that.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        os.environ.setdefault(HEALTH_CHECK_INTERVAL_S_ENV_VAR, POLL_S)
        if not get_dashboard_url():
            os.environ.setdefault(ENABLE_PREEMPTION_WATCHER_ENV_VAR, "0")
        super().__init__(*arguments, **settings)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        if get_dashboard_url():
            return callbacks
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]
