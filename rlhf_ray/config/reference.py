"""The documentation of the config, generated from its models: a JSON schema, the text for one key, and a Markdown reference.

Everything here is read from the JSON schema, so the three cannot disagree. A field's docstring is its description.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from rlhf_ray.config.loading import ConfigError
from rlhf_ray.config.run import RunConfig
from rlhf_ray.config.section import Section
from rlhf_ray.config.serving import ServingConfig

_NOT_SET = object()
_END_OF_SCALAR = "...\n"
"""What YAML writes after a document that is a single value."""
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "pattern": "matching `{}`",
}


def config_schema() -> dict[str, Any]:
    """The JSON schema of `RunConfig`, for editors that complete and check YAML files."""
    return _schema(RunConfig)


def describe_key(key: str) -> str:
    """The documentation of one key of a run's config, as plain text: its type, default and meaning.

    Args:
        key: for example `ppo.algorithm.kl.coefficient`. For a section, such as `ppo.algorithm`, its keys are listed, too. An
            empty key stands for the whole config. Positions in lists may be left out: `ppo.reward.judges.url`.

    Raises:
        ConfigError: there is no such key; the message names the closest ones.
    """
    schema = _schema(RunConfig)
    root = _root(schema)
    entry = root
    for part in (part for part in key.split(".") if part and not part.isdigit()):
        found = {child.name.rpartition(".")[2]: child for child in _children(entry, schema)}
        if part not in found:
            raise ConfigError(_unknown(key, [item.name for item in _walk(root, schema)]))
        entry = found[part]
    paragraphs = [entry.description]
    children = list(_children(entry, schema))
    if children and (of_section := _section(entry.node, schema)["description"]) != entry.description:
        paragraphs.append(of_section)
    lines = [] if entry is root else [f"{entry.name}: {_facts(entry, schema)}", ""]
    lines += [line for text in paragraphs for line in textwrap.wrap(text, 100)]
    lines += [""] * bool(children)
    lines += [f"  {child.name.rpartition('.')[2]}: {_facts(child, schema)}" for child in children]
    return "\n".join(lines).replace("`", "")


def config_reference() -> str:
    """All sections and keys of a run's config and of an endpoint's config, as a Markdown page."""
    run, serving = _schema(RunConfig), _schema(ServingConfig)
    parts = [
        "# Configuration reference",
        "Generated from the models in `rlhf_ray/config/`. `rlhf-ray config docs KEY` prints the same text for one key, and "
        "`rlhf-ray config schema` prints a JSON schema for editors.",
        "## A run (`rlhf-ray run CONFIG`)",
        *_sections(run),
        "## An endpoint (`rlhf-ray serve --config FILE`)",
        *_sections(serving),
    ]
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class _Key:
    """One key of the config and its place in the schema."""

    name: str
    """Dotted, empty for the whole config."""
    node: dict[str, Any]
    """Its part of the schema."""
    default: Any
    """`_NOT_SET` if the key must be set or its default is computed."""
    description: str
    required: bool


@cache
def _schema(model: type[Section]) -> dict[str, Any]:
    schema = model.model_json_schema()
    _unwrap(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _unwrap(node: Any) -> None:
    """Put every description on one line and drop titles that only repeat the names of keys."""
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _unwrap(value)
    if isinstance(node, dict):
        if isinstance(text := node.get("description"), str):
            node["description"] = " ".join(text.split())
        for key in node.get("properties", {}).values():
            key.pop("title", None)


def _section(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The definition of the section that a value of this key holds, also inside a list or as an alternative to null, or {}."""
    if "properties" in node:
        return node
    if "$ref" in node:
        return schema["$defs"][node["$ref"].rpartition("/")[2]]
    inner = [*node.get("anyOf", ()), *([node["items"]] if "items" in node else [])]
    return next((found for part in inner if (found := _section(part, schema))), {})


def _root(schema: dict[str, Any]) -> _Key:
    return _Key("", schema, _NOT_SET, schema["description"], required=False)


def _children(entry: _Key, schema: dict[str, Any]) -> Iterator[_Key]:
    section = _section(entry.node, schema)
    for name, node in section.get("properties", {}).items():
        default = node.get("default", _NOT_SET)
        if isinstance(entry.default, dict) and name in entry.default:
            default = entry.default[name]
        description = node.get("description") or _section(node, schema).get("description", "")
        yield _Key(f"{entry.name}.{name}".lstrip("."), node, default, description, name in section.get("required", ()))


def _walk(entry: _Key, schema: dict[str, Any]) -> Iterator[_Key]:
    for child in _children(entry, schema):
        yield child
        yield from _walk(child, schema)


def _type(node: dict[str, Any], schema: dict[str, Any]) -> str:
    """In words: `integer, at least 1, or null`."""
    if "anyOf" in node:
        return " or ".join(_type(part, schema) for part in node["anyOf"])
    if "$ref" in node:
        return "section"
    if "enum" in node:
        return f"one of {', '.join(f'`{value}`' for value in node['enum'])}"
    if "const" in node:
        return f"`{node['const']}`"
    kind = node.get("type", "any value")
    if kind == "array":
        items = node.get("items") or node["prefixItems"][0]
        count = f"{len(node['prefixItems'])} values, each " if "prefixItems" in node else ""
        return f"list of {count}{_type(items, schema)}"
    if kind == "object":
        values = node.get("additionalProperties")
        return f"mapping of names to {_type(values, schema)}" if isinstance(values, dict) and values else "mapping"
    if "examples" in node:
        return f"`{node['examples'][0]}`"
    limits = [text.format(_number(node[name])) for name, text in _BOUNDS.items() if name in node]
    return ", ".join([{"string": "text", "boolean": "true or false"}.get(kind, kind), *limits])


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _facts(entry: _Key, schema: dict[str, Any]) -> str:
    """Type and default. A key that always holds a section has the defaults of its keys."""
    kind = _type(entry.node, schema)
    if entry.required:
        return f"{kind}; required"
    if "$ref" in entry.node or entry.default is _NOT_SET:
        return kind
    value = yaml.safe_dump(entry.default, default_flow_style=True, width=10_000, allow_unicode=True)
    return f"{kind}; default `{value.removesuffix(_END_OF_SCALAR).strip()}`"


def _unknown(key: str, known: list[str]) -> str:
    same_end = [name for name in known if name.endswith(f".{key}")]
    close = same_end[:3] or difflib.get_close_matches(key, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`rlhf-ray config docs` without a key lists the sections"
    return f"{key}: unknown key; {hint}"


def _sections(schema: dict[str, Any]) -> Iterator[str]:
    """Markdown of every section, once each, however many keys hold such a section."""
    root = _root(schema)
    holders: dict[str, list[_Key]] = {"": [root]}
    for entry in _walk(root, schema):
        if section := _section(entry.node, schema):
            holders.setdefault(section["title"], []).append(entry)
    for entries in holders.values():
        first, section = entries[0], _section(entries[0].node, schema)
        yield f"### `{first.name}`" if first.name else "### Top level"
        yield section["description"]
        if others := entries[1:]:
            yield f"The same keys are in {', '.join(f'`{other.name}`' for other in others)}."
        yield "\n".join(_bullet(child, schema, holders) for child in _children(first, schema))


def _bullet(entry: _Key, schema: dict[str, Any], holders: dict[str, list[_Key]]) -> str:
    facts = _facts(entry, schema)
    if section := _section(entry.node, schema):
        anchor = holders[section["title"]][0].name.replace(".", "")
        facts = facts.replace("section", f"[section](#{anchor})", 1)
    return f"- **`{entry.name.rpartition('.')[2]}`** ({facts}): {entry.description}"
