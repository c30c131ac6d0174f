"""URIs: which are valid, and their local paths on a node."""

from __future__ import annotations

import pytest

from rlhf_ray.config import parse_config
from rlhf_ray.config.loading import ConfigError
from rlhf_ray.runs.storage.location import NotAStore, check_uri, copy_folder, local, portable, working_folder

BASE = {
    "name": "small",
    "model": {"path": "policy"},
    "stages": ["sft"],
    "data": {"demonstrations": {"location": "d.jsonl"}},
}


@pytest.mark.parametrize(
    "uri", ["s3://bucket/runs", "gs://bucket", "file:///mnt/runs", "abfs://container@account/runs"]
)
def test_stores_that_a_config_may_name(uri):
    check_uri(uri)
    assert parse_config(BASE | {"folder": uri}).folder == uri


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("ftp://host/runs", "unknown scheme 'ftp'; allowed are s3"),
        ("s3://", "names no place"),
        ("file://runs", "names no place"),
        ("s3://bucket/runs?endpoint_override=x", "AWS_ENDPOINT_URL"),
        ("s3://key:canary-1@bucket/runs", "credentials"),
        ("s3://canary-1@bucket/runs", "credentials"),
        ("s3://key:can/ary-1@bucket/runs", "credentials"),
    ],
)
def test_uris_that_are_refused_without_showing_a_secret(uri, says):
    with pytest.raises(ConfigError, match="folder") as refused:
        parse_config(BASE | {"folder": uri})
    assert says in str(refused.value) and "ary-1" not in str(refused.value)
    with pytest.raises(NotAStore):
        check_uri(uri)


def test_a_reference_is_understood_on_every_node(working_root, tmp_path, monkeypatch):
    run = working_folder("s3://bucket/runs/small")
    assert run.is_relative_to(working_root) and run.name == "small"
    assert run.parent != working_folder("s3://other/runs/small").parent
    reference = portable(run / "checkpoints" / "step_2")
    assert (
        reference == "s3://bucket/runs/small#checkpoints/step_2" and local(reference) == run / "checkpoints" / "step_2"
    )
    assert portable(tmp_path / "model") == str(tmp_path / "model") and local("model").name == "model"
    copy = copy_folder("s3://bucket/runs/small") / "sft"
    assert portable(copy) == str(copy), "what a command copied belongs to this machine"
    monkeypatch.setenv("RLHF_RAY_WORKING_FOLDER", str(tmp_path / "another node"))
    assert local(reference).relative_to(tmp_path / "another node").parts[1:] == ("small", "checkpoints", "step_2")
