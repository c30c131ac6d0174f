"""`rlhf-ray export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.cli.app import app


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run's folder, by path or URI", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Folder to write; it must not exist", show_default=False)],
    what: Annotated[str, typer.Option(help="policy, sft or reward_model")] = "policy",
) -> None:
    """Write a trained model as a Hugging Face folder to give away: safetensors, tokenizer, model card, figures."""
    from rlhf_ray.export.folder import export as write
    from rlhf_ray.runs.storage.session import read_run

    if what not in ("policy", "sft", "reward_model"):
        raise typer.BadParameter(f"{what!r} is none of policy, sft and reward_model")
    print(write(read_run(run, what), what, target))
