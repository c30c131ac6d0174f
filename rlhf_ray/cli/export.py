"""`rlhf-ray export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_ray.cli.app import SERVE, command

if TYPE_CHECKING:
    from rlhf_ray.export.folder import What


@command(SERVE, "rlhf-ray export runs/quickstart my-policy")
def export(
    run: Annotated[str, typer.Argument(help="A run's folder, by path or URI", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Folder to write; it must not exist", show_default=False)],
    what: Annotated[str, typer.Option(help="policy, sft or reward_model")] = "policy",
) -> None:
    """Write a trained model as a Hugging Face folder to share: safetensors, tokenizer, model card, figures."""
    from rlhf_ray.export.folder import export as write
    from rlhf_ray.runs.storage.session import read_run

    models: dict[str, What] = {"policy": "policy", "sft": "sft", "reward_model": "reward_model"}
    if what not in models:
        raise typer.BadParameter(f"--what {what}: allowed are {', '.join(models)}")
    print(write(read_run(run, what), models[what], target))
