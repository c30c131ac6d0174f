"""samples.jsonl: responses that the policy sampled during training, for people to read and for programs to count.

Invariant: after a resume at step N the file holds the samples of the steps up to N only, like metrics.jsonl.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_ray.runs.jsonl import Closeable, JsonLines, finite_or_none, read_jsonl
from rlhf_ray.types import Experience, FinishReason


@dataclass(frozen=True)
class Sample:
    """One line of samples.jsonl."""

    step: int
    id: str
    """`<prompt id>/<sample index>`."""
    prompt: tuple[dict[str, str], ...]
    """The conversation as `{"role", "content"}` messages."""
    response: str
    reward: float | None
    """The total reward that the policy was trained on; None if it was not finite."""
    reward_parts: dict[str, float | None]
    finish_reason: FinishReason


class SampleLog(Closeable):
    """Writes a run's samples.jsonl."""

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        """Open the log and keep its samples up to `resume_step`; None keeps none."""
        if resume_step is None:
            Path(path).unlink(missing_ok=True)
        self._lines = JsonLines(path, keep_until_step=resume_step)

    def write(self, step: int, experience: Experience, response: str) -> None:
        """Append one scored rollout of a step; `response` is its decoded text."""
        rollout, score = experience.rollout, experience.score
        sample = Sample(
            step=step,
            id=experience.id,
            prompt=rollout.prompt.messages,
            response=response,
            reward=finite_or_none(score.total),
            reward_parts={source: finite_or_none(part) for source, part in score.parts.items()},
            finish_reason=rollout.finish_reason,
        )
        self._lines.append(asdict(sample))

    def close(self) -> None:
        """Sync to disk and close."""
        self._lines.close()


def read_samples(path: str | Path) -> list[Sample]:
    """Read all samples in the order of their steps; a missing file has none."""
    return [Sample(**{**record, "prompt": tuple(record["prompt"])}) for record in read_jsonl(path)]
