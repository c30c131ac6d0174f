"""From YAML and `section.key=value` overrides to a `RunConfig`. Errors name the key, its value and what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rlhf_ray.config.run import RunConfig
from rlhf_ray.config.serving import ServingConfig
from rlhf_ray.errors import InputError

C = TypeVar("C", bound=BaseModel)


class ConfigError(InputError, ValueError):
    """The config cannot be used; the message lists all problems."""


NOT_SHOWN = "<not shown>"
"""Replaces environment values, which may be secrets, in a dumped config."""


class _Loader(yaml.SafeLoader):
    """Reads `1e-4` as a number (it is text in YAML 1.1) and refuses a key that is given twice (YAML keeps the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file and apply overrides such as `ppo.steps=20`.

    Raises:
        ConfigError: the file is missing or holds no YAML mapping, an override is malformed, or a field is invalid.
    """
    return parse_config(read_values(path, overrides), str(path))


def load_serving(path: Path | None, overrides: Sequence[str] = ()) -> ServingConfig:
    """Read the config of an endpoint. Without a file every key has its default.

    Raises:
        ConfigError: as `load_config`.
    """
    return _validated(ServingConfig, read_values(path, overrides), str(path or "serving"))


def read_values(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a config file after overrides and before validation; {} without a file.

    Raises:
        ConfigError: the file is missing or holds no YAML mapping, or an override is malformed.
    """
    values = {} if path is None else _read_file(path)
    for override in overrides:
        _apply(values, override)
    return values


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such config file")
    try:
        values = yaml.load(path.read_text(), _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(values).__name__}")
    return values


def parse_config(values: dict[str, Any], origin: str = "config") -> RunConfig:
    """Validate a mapping.

    Raises:
        ConfigError: values are invalid; the message lists all problems.
    """
    return _validated(RunConfig, values, origin)


def _validated(config: type[C], values: dict[str, Any], origin: str) -> C:
    try:
        return config.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(e, config)}" for e in error.errors())
        raise ConfigError(f"{origin}: {error.error_count()} problem(s)\n{problems}") from error


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back. Environment values may be secrets and are left out."""
    return yaml.safe_dump(_without_secrets(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        shown = {key: _without_secrets(item) for key, item in value.items()}
        if isinstance(env := shown.get("env"), dict):
            shown["env"] = dict.fromkeys(env, NOT_SHOWN)
        return shown
    return [_without_secrets(item) for item in value] if isinstance(value, list) else value


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: an override has the form section.key=value")
    *sections, last = key.split(".")
    node = values
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"{override!r}: {section} is {node!r}, not a section")
    try:
        node[last] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not valid YAML: {error}") from error


def _explain(error: Any, config: type[BaseModel]) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location) or "(whole config)"
    if error["type"] == "extra_forbidden":
        known = _fields_at(config, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{key}: required and not set"
    message = error["msg"].removeprefix("Value error, ")
    value = error["input"]
    # Environment values may be secrets, so messages do not show them.
    hidden = isinstance(value, dict | BaseModel) or {"env", "api_key_env", "url", "folder"} & set(location)
    shown = "" if hidden else f" (got {value!r})"
    return f"{key}: {message}{shown}"


def _fields_at(config: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Keys of the section at a location."""
    section = config
    for part in location:
        if part.isdigit():  # a position in a list of sections
            continue
        field = _keys(section).get(part)
        if field is None:
            return []
        options = [field.annotation, *get_args(field.annotation)]
        sections = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not sections:
            return []
        section = sections[0]
    return list(_keys(section))


def _keys(section: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in section.model_fields.items()}
