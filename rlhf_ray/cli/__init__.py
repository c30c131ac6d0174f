"""`rlhf-ray`: the console command. One module for each group of commands; importing it adds them to `app`."""

from __future__ import annotations

import os
import sys

from rlhf_ray.cli import data, export, jobs, run, serve, watch
from rlhf_ray.cli.app import app
from rlhf_ray.errors import InputError
from rlhf_ray.runtime.stopping import EXIT_STATUS, RunStopped

__all__ = ["app", "data", "export", "jobs", "main", "run", "serve", "watch"]


def main() -> None:
    """Run the command; what the user can mend is said in one line, without a traceback."""
    # People keep their reward functions in the directory they start from; a console script does not look there by itself.
    sys.path.insert(0, os.getcwd())
    try:
        app()
    except RunStopped as stopped:
        print(f"rlhf-ray: {stopped}; go on with --resume", file=sys.stderr)
        raise SystemExit(EXIT_STATUS) from stopped
    except (InputError, FileNotFoundError) as error:
        print(f"rlhf-ray: {error}", file=sys.stderr)
        raise SystemExit(2) from error
