"""`rlhf-ray`: the console command. Each module adds its commands to `app` when it is imported."""

from __future__ import annotations

import os
import sys

# The order of the imports is the order of the groups in `rlhf-ray --help`.
# isort: off
from rlhf_ray.cli.app import app
from rlhf_ray.cli import run, jobs, watch, serve, export, init, config, data

# isort: on
from rlhf_ray.errors import InputError
from rlhf_ray.runtime.stopping import EXIT_STATUS, RunStopped

__all__ = ["app", "config", "data", "export", "init", "jobs", "main", "run", "serve", "watch"]


def main() -> None:
    """Run the command. Errors that the user can correct are printed without a traceback."""
    # Reward functions of users are often in the current directory, where a console script does not look by itself.
    sys.path.insert(0, os.getcwd())
    try:
        app(prog_name="rlhf-ray")
    except RunStopped as stopped:
        print(f"rlhf-ray: {stopped}; continue with --resume", file=sys.stderr)
        raise SystemExit(EXIT_STATUS) from stopped
    except (InputError, FileNotFoundError) as error:
        print(f"rlhf-ray: {error}", file=sys.stderr)
        raise SystemExit(2) from error
