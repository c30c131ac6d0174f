"""Values of `workers.env`, which may be secrets: taken out of a config, and put back into its dump.

Invariant: what `environment_values` takes from a config, `as_overrides` puts into its dump again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rlhf_ray.config.run import RunConfig


def environment_values(config: RunConfig) -> dict[str, dict[str, str]]:
    """Every `env` that is not empty, by its key: `ppo.rollout.workers.env`."""
    return _collect(config.model_dump(mode="json"), "")


def as_overrides(values: Mapping[str, Mapping[str, str]]) -> list[str]:
    """`section.key=value` for each of them."""
    return [f"{key}={json.dumps(dict(env))}" for key, env in values.items()]


def _collect(value: Any, key: str) -> dict[str, dict[str, str]]:
    if not isinstance(value, dict):
        return {}
    found = {f"{key}env": value["env"]} if isinstance(value.get("env"), dict) and value["env"] else {}
    for name, item in value.items():
        found |= _collect(item, f"{key}{name}.")
    return found
