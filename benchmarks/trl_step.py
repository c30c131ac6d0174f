"""TRL's side of `ppo_step.py`: times the steps of `GRPOTrainer` in a separate process.

Usage: `python trl_step.py SETTINGS.json`. `ppo_step.py` writes the settings and reads the result file. TRL generates with
transformers, as it does where there is no GPU; saving, reports and progress bars are off.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from common import make_prompts, share_of_lower_case
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Timed(GRPOTrainer):
    """A trainer that times its generation."""

    generated: list[tuple[float, int]]
    """Seconds and response tokens of each step."""

    def _generate_single_turn(self, *arguments, **options):
        began = time.perf_counter()
        completions, logprobs = super()._generate_single_turn(*arguments, **options)
        self.generated.append((time.perf_counter() - began, sum(map(len, completions))))
        return completions, logprobs


class StepTimes(TrainerCallback):
    """Seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.at = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.at)
        self.at = now


def lower_case(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """The reward with the signature of TRL's reward functions."""
    return share_of_lower_case(completions)


def main(settings: dict) -> None:
    fixed, bf16 = settings["ignore_eos"], settings["bf16"]
    config = GRPOConfig(
        output_dir=str(Path(settings["folder"]) / "trl"),
        use_cpu=True,
        bf16=bf16,
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=settings["samples"] // settings["micro_batch"],
        num_generations=settings["group"],
        max_completion_length=settings["max_new_tokens"],
        generation_kwargs={"min_new_tokens": settings["max_new_tokens"]} if fixed else None,
        beta=settings["kl"],
        learning_rate=settings["learning_rate"],
        max_steps=settings["steps"],
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    times = StepTimes()
    model = AutoModelForCausalLM.from_pretrained(settings["model"])
    trainer = Timed(
        model,
        lower_case,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": make_prompts(settings["prompts"])}),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        callbacks=[times],
    )
    trainer.generated = []
    trainer.train()
    steps = [
        {"step_s": seconds, "rollout_s": generation, "tokens": tokens}
        for seconds, (generation, tokens) in zip(times.seconds, trainer.generated, strict=True)
    ]
    Path(settings["result"]).write_text(json.dumps(steps))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
