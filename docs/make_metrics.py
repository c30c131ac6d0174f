"""docs/metrics.md, made from the catalogue: `python -m docs.make_metrics > docs/metrics.md`."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf_ray.telemetry.names import EVERY, FAMILIES, METRICS, PPO, REWARD_MODEL, SFT, SUPERVISED, exported_name
from rlhf_ray.telemetry.prometheus import RUN_METRICS, SERVING_METRICS, ExportedMetric

_INTRODUCTION = """# Metrics

Made by `python -m docs.make_metrics`; a test compares it with the code.

A figure has one name everywhere: in the stages' `metrics.jsonl`, in TensorBoard and in Weights & Biases it stands as it is.
Prometheus finds it under the second name, with the labels `run` and `stage` (docs/monitoring.md). One that was NaN, infinite or
could not be measured is null in `metrics.jsonl`, and no number anywhere. `%` marks a share between 0 and 1.
"""


def metric_table() -> str:
    """The page, as Markdown."""
    parts = [_INTRODUCTION]
    for title, stages in (("PPO", (PPO,)), ("SFT and reward models", (SUPERVISED, SFT, REWARD_MODEL, EVERY))):
        rows = [
            (f"`{metric.name}`", f"`{exported_name(metric.name)}`", metric.unit, metric.description, metric.stage)
            for metric in METRICS.values()
            if metric.stage in stages
        ]
        parts.append(_section(title, ("name", "in Prometheus", "unit", "meaning", "stage"), rows))
    families = [
        (f"`{family.template}`", f"`{family.exported_name}`", family.unit, family.description, family.stage)
        for family in FAMILIES
    ]
    title = "Named by phases, roles, sources of reward and services"
    parts.append(_section(title, ("name", "in Prometheus", "unit", "meaning", "stage"), families))
    parts.append(_section("In Prometheus only", ("in Prometheus", "unit", "labels", "meaning"), _exported(RUN_METRICS)))
    parts.append(_section("Of an endpoint", ("in Prometheus", "unit", "labels", "meaning"), _exported(SERVING_METRICS)))
    parts.append(
        "Ray Serve exports these for the gateway, for every version and for the reward model. vLLM's own metrics\n"
        "(`ray_vllm_*`) are off: engines are started without statistics, which cost them time.\n"
    )
    return "\n".join(parts)


def _exported(metrics: Iterable[ExportedMetric]) -> list[tuple[str, ...]]:
    return [
        (
            f"`{metric.name}`" + (" (histogram)" if metric.histogram else ""),
            metric.unit,
            ", ".join(f"`{label}`" for label in metric.labels),
            metric.description,
        )
        for metric in metrics
    ]


def _section(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return f"## {title}\n\n" + "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )


if __name__ == "__main__":
    print(metric_table(), end="")
