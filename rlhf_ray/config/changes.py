"""Which keys of the config may change when a run is resumed, and the environment variables in a config.

Invariant: a key that decides *what* is computed may not change. How long, where, and how often it is saved may.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from typing import Any

import yaml

from rlhf_ray.config.loading import ConfigError, dump_config
from rlhf_ray.config.run import RunConfig

MAY_CHANGE = (
    "folder", "stages", "cluster.*", "alerts.*", "telemetry.*", "ppo.publishing*", "ppo.steps", "ppo.checkpoint.*",
    "ppo.placement.*", "evaluation.*", "*.workers.*", "*.micro_batch_tokens", "ppo.rollout.max_concurrent",
    "ppo.rollout.kv_cache_gb", "ppo.rollout.gpu_memory_utilization", "ppo.rollout.weights.*", "ppo.reward.batch_tokens",
    "*.price", "*.price.*", "ppo.environment.concurrency", "ppo.environment.timeout_s",
    *(f"ppo.reward.{kind}.*.{key}" for kind in ("judges", "http") for key in (
        "url", "api_key_env", "concurrency", "requests_per_minute", "timeout_s", "attempts", "backoff_s", "batch_size", "cache",
    )),
)  # fmt: skip
"""Keys that do not decide what is computed. DeepSpeed itself refuses a checkpoint of another number of ranks."""


def check_unchanged(before: str, config: RunConfig) -> None:
    """Compare a run's `config.yaml` with the config that would resume it.

    Raises:
        ConfigError: keys differ that must not; the message lists them.
    """
    old, new = _flat(yaml.safe_load(before)), _flat(yaml.safe_load(dump_config(config)))
    changed = [
        f"  {key}: was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(fnmatch.fnmatch(key, pattern) for pattern in MAY_CHANGE)
    ]
    if changed:
        raise ConfigError(
            "the run was started with another config; resume it with the old values, or give the new run another name\n"
            + "\n".join(changed)
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {prefix: value}
    result: dict[str, Any] = {}
    for key, item in value.items():
        result |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return result


def environment_values(config: RunConfig) -> dict[str, dict[str, str]]:
    """Every `env` that is not empty, by its dotted key such as `ppo.rollout.workers.env`."""
    return _collect(config.model_dump(mode="json"), "")


def as_overrides(values: Mapping[str, Mapping[str, str]]) -> list[str]:
    """`section.key=value` for every `env`."""
    return [f"{key}={json.dumps(dict(env))}" for key, env in values.items()]


def _collect(value: Any, key: str) -> dict[str, dict[str, str]]:
    if not isinstance(value, dict):
        return {}
    found = {f"{key}env": value["env"]} if isinstance(value.get("env"), dict) and value["env"] else {}
    for name, item in value.items():
        found |= _collect(item, f"{key}{name}.")
    return found
