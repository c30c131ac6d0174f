"""`rlhf-ray config`: the JSON schema of config files, and the documentation of their keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.cli.app import CONFIG, app

config = typer.Typer(help="Describe the keys of config files.", no_args_is_help=True)
app.add_typer(config, name="config", rich_help_panel=CONFIG, epilog="Example: rlhf-ray config docs ppo.batch_size")


@config.command(epilog="Example: rlhf-ray config schema --output rlhf-ray.schema.json")
def schema(
    output: Annotated[Path | None, typer.Option(help="File to write; default: print it", show_default=False)] = None,
) -> None:
    """Print the JSON schema of config files, for completion and checks in editors.

    An editor with a YAML language server reads it if the config begins with: # yaml-language-server: $schema=FILE
    """
    from rlhf_ray.config.reference import config_schema

    text = json.dumps(config_schema(), indent=1, ensure_ascii=False)
    if output is None:
        print(text)
    else:
        output.write_text(text + "\n", encoding="utf-8")
        print(f"wrote    {output}")


@config.command(epilog="Example: rlhf-ray config docs ppo.rollout.sampling.temperature")
def docs(
    key: Annotated[str, typer.Argument(help="A key or section, such as ppo.batch_size", show_default=False)] = "",
) -> None:
    """Explain a key: its type, default and meaning; of a section also its keys. Without a key, the top level."""
    from rlhf_ray.config.reference import describe_key

    print(describe_key(key))
