"""Which files are sent to the cluster."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path, PurePath

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

import rlhf_ray
from rlhf_ray.jobs import packing
from rlhf_ray.jobs.packing import CONFIG, PackageTooLarge, files_to_pack, is_left_out, pack

KEPT = ("rewards.py", "secret_santa.py", "data/prompts.jsonl", "prompts/monkey.txt", "environment.yaml")
LEFT = (
    ".env", ".env.production", "deploy/server.pem", "tls.key", "id_ed25519", "aws-credentials", "my_secrets.yaml", "hf.token",
    ".git/config", ".ssh/known_hosts", "package/__pycache__/a.pyc", ".pytest_cache/x", "x.egg-info/PKG-INFO",
    "service-account-1.json", ".gitignore", "data/.gitignore", ".rayignore",
)  # fmt: skip


def write(root: Path, *names: str, text: str = "x") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def names(root: Path, *named: str) -> set[str]:
    return {str(path) for path in files_to_pack(root, named)}


@pytest.mark.parametrize("name", KEPT)
def test_code_and_data_are_packed(name):
    assert not is_left_out(PurePath(name))


@pytest.mark.parametrize("name", LEFT)
def test_secrets_and_caches_are_not_packed(name):
    assert is_left_out(PurePath(name))


def test_ray_sends_the_whole_package_even_if_git_ignores_such_names(tmp_path):
    root, into = tmp_path / "root", tmp_path / "into"
    root.mkdir()
    into.mkdir()
    subprocess.run(["git", "init", "-q", root], check=True)
    write(root, ".gitignore", ".rayignore", "lib/.gitignore", text="data/\n*.yaml\nhelper.py\n")
    write(root, "rewards.py", "data/a.jsonl")
    write(root, "lib/helper.py")
    package = pack(root, "name: a\n", ["data/a.jsonl", "lib"], into)
    # As Ray makes the archive of a job's working directory.
    archive = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(into), archive, include_gitignore=True, include_parent_dir=False, excludes=excludes)
    sent = {name for name in zipfile.ZipFile(archive).namelist() if not name.endswith("/")}
    ours = Path(rlhf_ray.__file__).parent
    code = {f"rlhf_ray/{path.relative_to(ours)}" for path in ours.rglob("*.py")}
    assert {"rewards.py", "data/a.jsonl", "lib/helper.py", str(CONFIG)} | code <= sent
    assert any(name.startswith("rlhf_ray/data/") for name in code)
    assert {str(path) for path in package.files} <= sent, "all reported files are sent"


@pytest.mark.parametrize("git", [False, True])
def test_only_files_that_a_run_needs_are_packed(tmp_path, git):
    if git:
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
    write(tmp_path, *KEPT, *(name for name in LEFT if not name.startswith(".git/")))
    write(tmp_path, "venv/pyvenv.cfg", "venv/lib/a.py", "runs/one/events.jsonl", "runs/one/policy/model.safetensors")
    write(tmp_path, "notes.txt", text="-----BEGIN OPENSSH PRIVATE KEY-----\nabc")
    (tmp_path / "outside").symlink_to("/etc/hostname")
    (tmp_path / "disguise.txt").symlink_to(tmp_path / ".env")
    assert names(tmp_path) == set(KEPT)


def test_files_that_git_ignores_are_packed_only_if_the_config_names_them(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    write(tmp_path, ".gitignore", text="data/\nmodels/\n*.tmp\n")
    write(
        tmp_path, "rewards.py", "a.tmp", "data/a.jsonl", "data/b.jsonl", "models/tiny/config.json", "models/tiny/.env"
    )
    assert names(tmp_path) == {"rewards.py"}
    asked = names(tmp_path, "data/a.jsonl", "models/tiny")
    assert asked == {"rewards.py", "data/a.jsonl", "models/tiny/config.json"}


def test_the_package_contains_this_version_and_the_config(tmp_path):
    root, into = tmp_path / "root", tmp_path / "into"
    write(root, "rewards.py", "rlhf_ray/old.py")
    into.mkdir()
    package = pack(root, "name: a\n", [], into)
    assert (into / CONFIG).read_text() == "name: a\n" and (into / "rewards.py").is_file()
    assert (into / "rlhf_ray" / "__main__.py").is_file() and not (into / "rlhf_ray" / "old.py").exists()
    assert not list(into.rglob("__pycache__")) and package.bytes == 2


def test_a_file_that_contains_a_known_secret_is_left_out(tmp_path):
    write(tmp_path, "config.yaml", text="env: {KEY: hunter22}")
    write(tmp_path, "rewards.py")
    (tmp_path / "into").mkdir()
    package = pack(tmp_path, None, [], tmp_path / "into", ["hunter22"])
    assert [str(path) for path in package.files] == ["rewards.py"] and [str(p) for p in package.left_out] == [
        "config.yaml"
    ]
    assert not (tmp_path / "into" / "config.yaml").exists()


def test_a_package_that_is_too_large_is_refused_with_the_largest_files(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "LIMIT_MB", 1)
    write(tmp_path, "small.txt")
    write(tmp_path, "models/big.bin", text="x" * (2 << 20))
    (tmp_path / "into").mkdir()
    with pytest.raises(PackageTooLarge, match=r"2 MiB to send(.|\n)*2.0 MiB  models/big.bin"):
        pack(tmp_path, None, [], tmp_path / "into")
