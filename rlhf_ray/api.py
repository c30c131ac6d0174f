"""The Python API: `from rlhf_ray import RunConfig, load_config, run, load_run`.

`run` does what `rlhf-ray run` does, and `load_run` reads a run's folder, by path or URI, finished or still running.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlhf_ray import recipes
from rlhf_ray.config import ConfigError, RunConfig, load_config, parse_config
from rlhf_ray.config.loading import NOT_SHOWN
from rlhf_ray.config.run import Stage
from rlhf_ray.runs.run_folder import RunFolder, RunFolderError, put_aside
from rlhf_ray.runs.storage.location import is_uri

if TYPE_CHECKING:
    import pandas

    from rlhf_ray.runs.events import Event
    from rlhf_ray.runs.samples import Sample
    from rlhf_ray.runs.status import RunStatus

__all__ = ["LoadedRun", "OnStep", "RunConfig", "load_config", "load_run", "run"]

OnStep = Callable[[int, Mapping[str, float]], None]
"""Called with the number of a PPO step and its metrics."""


@dataclass(frozen=True)
class LoadedRun:
    """The results of a run. Its methods read the files when they are called, so they also follow a run in progress."""

    folder: RunFolder
    """Paths of all files."""

    @property
    def config(self) -> RunConfig:
        """The resolved config. Values of `env` are not saved with a run, so they are missing."""
        path = self.folder.config
        return parse_config(_without_hidden_values(yaml.safe_load(path.read_text(encoding="utf-8"))), str(path))

    @property
    def policy(self) -> Path:
        """Hugging Face folder of the policy that PPO trained."""
        return self.folder.policy

    @property
    def report(self) -> Path:
        """The report page."""
        return self.folder.report

    def status(self) -> RunStatus:
        """The current stage, step and main figures."""
        from rlhf_ray.runs.status import read_status

        return read_status(self.folder)

    def metrics(self, stage: str = "ppo") -> list[dict[str, Any]]:
        """One record for each step of a stage (`ppo`, `sft`, `reward_model`); empty if the stage has not started."""
        from rlhf_ray.runs.metrics import read_metrics

        return read_metrics(self.folder.stage_metrics(stage))

    def metrics_frame(self, stage: str = "ppo") -> pandas.DataFrame:
        """The same as a table with one row for each step."""
        import pandas

        records = self.metrics(stage)
        return pandas.DataFrame(records).set_index("step") if records else pandas.DataFrame()

    def events(self) -> list[Event]:
        """Stages, checkpoints, faults, dropped data, alerts, … in the order in which they happened."""
        from rlhf_ray.runs.events import read_events

        return read_events(self.folder.events)

    def samples(self) -> list[Sample]:
        """Responses of the policy during training, with their rewards."""
        from rlhf_ray.runs.samples import read_samples

        return read_samples(self.folder.samples)

    def evaluation(self) -> dict[str, Any] | None:
        """The comparison of the base, SFT and PPO policies; None if the run has not been evaluated."""
        path = self.folder.evaluation
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def run(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    fresh: bool = False,
    only: Stage | None = None,
    on_step: OnStep | None = None,
) -> LoadedRun:
    """Run all stages of a config and return the results.

    Args:
        config: a `RunConfig`, its fields as a mapping, a YAML file, or `recipe:NAME`.
        resume: continue the run of this name, if its folder contains one.
        fresh: rename an older run of this name and start again.
        only: run only this stage.
        on_step: called after each PPO step with its number and metrics; in another thread if an event loop runs in this one.

    Raises:
        InputError: the config, the data, a model or the run's folder cannot be used; before anything starts.
        RunStopped: the run was asked to stop and has saved a checkpoint.
    """
    settings = as_config(config)
    if fresh and resume:
        raise ConfigError("fresh starts a new run and resume continues one; choose one of them")
    if fresh:
        if is_uri(settings.folder):
            raise ConfigError(
                f"fresh: {settings.folder!r} is on a store, which cannot rename a run; choose another name"
            )
        put_aside(RunFolder(f"{settings.folder}/{settings.name}"))
    from rlhf_ray.driver.hooks import StepCallback
    from rlhf_ray.stages.run import run as run_stages

    hooks = () if on_step is None else (StepCallback(on_step),)
    return LoadedRun(run_stages(settings, resume, only, hooks))


def as_config(config: RunConfig | Mapping[str, Any] | str | Path) -> RunConfig:
    """The validated config from any of the forms that `run` accepts.

    Raises:
        ConfigError, UnknownRecipe: it cannot be used.
    """
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, Mapping):
        return parse_config(dict(config))
    name = str(config)
    return load_config(
        recipes.find(name.removeprefix(recipes.PREFIX)) if name.startswith(recipes.PREFIX) else Path(name)
    )


def load_run(path: str | Path, models: Sequence[str] = ()) -> LoadedRun:
    """The results of a run.

    Args:
        path: the run's folder; or its URI on a store, of which a local copy is made.
        models: models to copy from a store with their weights, such as `policy`.

    Raises:
        RunFolderError: there is no run.
    """
    from rlhf_ray.runs.storage.session import read_run

    folder = read_run(str(path), *models)
    if not folder.config.is_file():
        raise RunFolderError(f"{folder.path} is not a run's folder: it has no config.yaml")
    return LoadedRun(folder)


def _without_hidden_values(value: Any) -> Any:
    """Part of a saved config without the entries of `env`, whose values are not saved."""
    if isinstance(value, dict):
        return {key: _without_hidden_values(item) for key, item in value.items() if item != NOT_SHOWN}
    return [_without_hidden_values(item) for item in value] if isinstance(value, list) else value
