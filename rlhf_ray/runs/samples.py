"""What the policy wrote while it was trained: samples.jsonl, for people to read and for programs to count.

Invariant: after a resume at step N the file holds samples of the steps up to N only, like metrics.jsonl.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_ray.runs.jsonl import Closing, JsonLines, finite_or_none, read_jsonl
from rlhf_ray.types import Experience, FinishReason


@dataclass(frozen=True)
class Sample:
    """One line of samples.jsonl."""

    step: int
    id: str
    """`<prompt id>/<sample index>`."""
    prompt: tuple[dict[str, str], ...]
    """The conversation, as `{"role", "content"}`."""
    response: str
    reward: float | None
    """The total that the policy was trained on; None where it was not finite."""
    reward_parts: dict[str, float | None]
    finish_reason: FinishReason


class SampleLog(Closing):
    """The run's samples.jsonl."""

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        """None starts an empty file; N keeps what was written up to step N."""
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
        """Sync and close."""
        self._lines.close()


def read_samples(path: str | Path) -> list[Sample]:
    """All samples in the order of their steps; empty where there is no file."""
    return [Sample(**{**record, "prompt": tuple(record["prompt"])}) for record in read_jsonl(path)]
