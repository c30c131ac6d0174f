"""Strict configuration: one pydantic model per section, YAML and overrides in, `RunConfig` out."""

from rlhf_ray.config.loading import ConfigError, dump_config, load_config, parse_config
from rlhf_ray.config.run import RunConfig

__all__ = ["ConfigError", "RunConfig", "dump_config", "load_config", "parse_config"]
