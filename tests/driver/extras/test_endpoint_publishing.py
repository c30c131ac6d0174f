"""Which policies of a run are published to its endpoint, and what happens if the endpoint refuses one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf_ray.config.serving import PublishingConfig
from rlhf_ray.driver.extras.endpoint_publishing import Candidate, EndpointPublishing, NotDeployed
from rlhf_ray.runs.events import EventLog, read_events


class Endpoint:
    """An endpoint in this process that records what is deployed."""

    def __init__(self) -> None:
        self.deployed: list[tuple[int, float]] = []
        self.folders: list[str] = []
        self.refuses: Exception | None = None

    def deploy(self, step: int, folder: Path, share: float) -> list[str]:
        if self.refuses is not None:
            raise self.refuses
        assert (folder / "config.json").is_file()
        self.deployed.append((step, share))
        self.folders = [*self.folders, str(folder)][-2:]
        return self.folders


def publish(
    tmp_path: Path,
    qualities: Sequence[float],
    endpoint: Endpoint,
    begin: int = 0,
    kl: float | None = None,
    settled: bool = True,
    **config: float,
) -> list[dict[str, float]]:
    """Pass the policies of the steps after `begin`, whose answers have the given values, to the hook; returns the metrics."""

    async def run(events: EventLog) -> list[dict[str, float]]:
        async def examine(step: int) -> Candidate:
            return Candidate(step, [qualities[step]] * 16, kl)

        async def save(folder: Path) -> None:
            folder.mkdir()
            (folder / "config.json").write_text("{}")

        publishing = EndpointPublishing(
            PublishingConfig(**{"every": 1, **config}), tmp_path / "published", examine, save, endpoint.deploy, events
        )
        await publishing.start(begin)
        metrics_of_steps = []
        for step in range(begin + 1, len(qualities)):
            metrics_of_steps.append(await publishing.after_sync(step))
            if settled:
                await publishing.close()
        await publishing.close()
        return metrics_of_steps

    with EventLog(tmp_path / "events.jsonl") as events:
        return asyncio.run(run(events))


def kinds(tmp_path: Path) -> list[str]:
    return [event.kind for event in read_events(tmp_path / "events.jsonl")]


def test_only_what_is_better_than_the_last_is_published(tmp_path):
    endpoint = Endpoint()
    metrics_of_steps = publish(tmp_path, [0, 1, 1, 0.5, 2], endpoint, share=0.25)
    assert endpoint.deployed == [(1, 0.25), (4, 0.25)]
    assert [metrics["publishing/win_rate"] for metrics in metrics_of_steps] == [1.0, 0.5, 0.0, 1.0]
    assert metrics_of_steps[0]["publishing/win_rate_low"] == pytest.approx(0.806, abs=1e-3), (
        "Wilson's interval of 16 of 16"
    )
    first, second = read_events(tmp_path / "events.jsonl")
    assert "wins 100% (81%–100%) of 16 prompts against that the run began with" in first.message
    assert second.message.endswith("against that of step 1") and second.fields["step"] == 4


def test_training_does_not_wait_for_engines_that_start(tmp_path):
    endpoint = Endpoint()
    metrics_of_steps = publish(tmp_path, [0, 1, 2], endpoint, settled=False)
    assert endpoint.deployed == [(1, 1.0)] and metrics_of_steps[1] == {}
    assert sorted(kinds(tmp_path)) == ["release", "warning"]


def test_only_at_every_nth_step(tmp_path):
    endpoint = Endpoint()
    assert publish(tmp_path, range(7), endpoint, every=3).count({}) == 4
    assert [step for step, _ in endpoint.deployed] == [3, 6]


def test_a_small_lead_is_not_enough(tmp_path):
    endpoint = Endpoint()
    publish(tmp_path, [0, 1], endpoint, better_than=0.81)
    assert endpoint.deployed == []


def test_a_policy_too_far_from_the_reference_is_not_published_and_a_warning_says_so(tmp_path):
    endpoint = Endpoint()
    publish(tmp_path, [0, 1], endpoint, kl=7.0, kl_limit=5.0)
    publish(tmp_path / "near", [0, 1], endpoint, kl=4.0, kl_limit=5.0)
    assert len(endpoint.deployed) == 1 and kinds(tmp_path) == ["warning"]


def test_nothing_is_known_where_all_rewards_failed(tmp_path):
    assert publish(tmp_path, [0, math.nan], endpoint := Endpoint()) == [{}] and endpoint.deployed == []


def test_an_endpoint_that_fails_costs_nothing_and_the_next_candidate_is_tried(tmp_path):
    endpoint = Endpoint()
    endpoint.refuses = NotDeployed("no memory for its engines")
    publish(tmp_path, [0, 1], endpoint)
    assert kinds(tmp_path) == ["fault"] and not list((tmp_path / "published").glob("step_*"))
    endpoint.refuses = None
    publish(tmp_path, [0, 1, 1], endpoint, begin=1)
    assert endpoint.deployed == [(2, 1.0)], "still compared with what the run began with"


def test_a_programming_error_is_not_taken_for_a_fault_of_the_endpoint(tmp_path):
    endpoint = Endpoint()
    endpoint.refuses = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        publish(tmp_path, [0, 1], endpoint)


def test_a_resumed_run_goes_on_from_what_was_published(tmp_path):
    endpoint = Endpoint()
    publish(tmp_path, [0, 1, 2], endpoint)
    publish(tmp_path, [0, 1, 2, 3], endpoint, begin=1)
    assert [step for step, _ in endpoint.deployed] == [1, 2, 3], "step 2 came again and is no better than itself"


def test_versions_that_are_no_longer_served_are_removed(tmp_path):
    publish(tmp_path, range(5), endpoint := Endpoint())
    assert sorted(path.name for path in (tmp_path / "published").glob("step_*")) == ["step_3", "step_4"]
    assert len(endpoint.deployed) == 4
