"""`rlhf-ray config schema` and `rlhf-ray config docs`."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.config import ConfigError


def test_the_schema_is_printed_or_written(tmp_path):
    printed = CliRunner().invoke(app, ["config", "schema"])
    assert printed.exit_code == 0 and "ppo" in json.loads(printed.output)["properties"]
    written = CliRunner().invoke(app, ["config", "schema", "--output", str(tmp_path / "schema.json")])
    assert written.exit_code == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == json.loads(printed.output)


def test_a_key_is_explained():
    result = CliRunner().invoke(app, ["config", "docs", "ppo.batch_size"])
    assert result.exit_code == 0 and "ppo.batch_size: integer" in result.output and "default 64" in result.output
    assert "ppo" in CliRunner().invoke(app, ["config", "docs"]).output


def test_an_unknown_key_is_refused():
    result = CliRunner().invoke(app, ["config", "docs", "ppo.batchsize"])
    assert isinstance(result.exception, ConfigError) and "ppo.batch_size" in str(result.exception)
