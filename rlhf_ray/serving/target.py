"""What people point at when they serve: a run, or a model's folder."""

from __future__ import annotations

import re

from rlhf_ray.models.loading import NotAModel, check_model_folder
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.storage.folders import copy_here
from rlhf_ray.runs.storage.location import is_reference, is_uri
from rlhf_ray.runs.storage.session import read_run
from rlhf_ray.serving.versions import Version


def version_of(path: str, label: str | None = None) -> Version:
    """The newest policy of a run's folder, or the model of a Hugging Face folder.

    Args:
        path: of either. A run may also be named by its URI, and a model in it by `URI#name`: then each node that serves it
            fetches it.
        label: the version's name; by default the run's with its step, or the folder's.

    Raises:
        NotAModel: it is neither.
    """
    if is_reference(path):
        copy_here(path, weights=False)
        run, _, name = path.partition("#")
        return Version(plain(label or f"{run.rpartition('/')[2]}-{name}"), path)
    run = read_run(path)
    if not run.config.is_file():
        folder, name = run.path, run.path.name
    elif run.policy.is_dir():
        records = read_metrics(run.metrics) if run.metrics.is_file() else []
        folder, name = run.policy, f"{run.name}-{records[-1]['step']}" if records else run.name
    else:
        folder, name = run.sft, f"{run.name}-sft"
    if is_uri(path):  # whether it is whole is looked at there
        return version_of(f"{path.rstrip('/')}#{folder.name}", label or name)
    if run.config.is_file() and not folder.is_dir():
        raise NotAModel(f"{path!r} is a run that has no policy yet, and no SFT model; wait for it, or name another")
    if not folder.is_dir():
        raise NotAModel(
            f"{path!r} is neither the folder of a run nor a Hugging Face model folder: there is no such folder"
        )
    check_model_folder(str(folder), "the model to serve")
    return Version(plain(label or name), str(folder))


def plain(name: str) -> str:
    """A name for a version: letters, digits, `.`, `_` and `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "policy"
