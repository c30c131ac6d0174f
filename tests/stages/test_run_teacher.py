"""A judge and a teacher on the real engines: vLLM rollouts, DeepSpeed learners, a judge over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf_ray.config import RunConfig, parse_config
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.samples import read_samples
from rlhf_ray.stages.run import run
from tests.rewards.services import Answer, Request, quoted, serve, verdict

KEY = "sk-Very-Secret-42"
SMALL = {"cpus": 0.1}


def config(folder: Path, model: Path, name: str, **ppo: Any) -> RunConfig:
    asked = [{"prompt": [{"role": "user", "content": f"Hello, where is my order {n}?"}]} for n in range(20)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in asked))
    section = {
        "steps": 2,
        "batch_size": 8,
        "samples_per_prompt": 4,
        "rollout": {"workers": SMALL, "kv_cache_gb": 0.05, "sampling": {"max_new_tokens": 12}},
        "policy": {"workers": SMALL, "optimizer": {"learning_rate": 3e-3, "schedule": "constant"}},
    }
    data = {"prompts": {"location": str(prompts)}, "max_prompt_tokens": 80, "max_dialogue_tokens": 120}
    values = {"name": name, "folder": str(folder), "stages": ["ppo"], "model": {"path": str(model)}, "data": data}
    return parse_config(values | {"ppo": section | ppo})


def shorter(request: Request) -> Answer:
    """Prefer the shorter answer, and the first of equally long ones."""
    question = request.body["messages"][0]["content"]
    a, b = (quoted(question, f"response {side}") for side in "AB")
    return Answer(verdict("A" if len(a) <= len(b) else "B"))


def test_a_judge_and_a_teacher_together(ray_cluster, tiny_model, tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    with serve(shorter) as service:
        judge = {"url": service.url, "model": "judge-1", "api_key_env": "TEST_JUDGE_KEY", "price": {"prompt": 2.0}}
        settings = config(
            tmp_path, tiny_model, "judged",
            algorithm={"advantage": "grpo", "kl": {"placement": "none"}},
            reward={"model": None, "workers": SMALL, "judges": [judge], "batch_tokens": 100},
            teacher={"model": str(tiny_teacher), "coefficient": 0.5, "workers": SMALL},
        )  # fmt: skip
        folder = run(settings)
    records = read_metrics(folder.metrics)
    assert len(records) == 2 and all(record["policy/grad_norm"] > 0 for record in records)
    for record in records:
        assert record["reward/mean"] == pytest.approx(0.5), "wins and losses balance: groups were judged whole"
        assert record["teacher/kl"] > 0.01 and record["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
        assert record["service/judge/requests"] > 0 and record["service/judge/first_rate"] == pytest.approx(
            0.5, abs=0.1
        )
        assert record["service/judge/cost"] == pytest.approx(record["service/judge/prompt_tokens"] * 2e-6)
    assert all(set(sample.reward_parts) == {"judge"} for sample in read_samples(folder.samples))
    assert sum(record["service/judge/requests"] for record in records) == len(service.requests)
    assert {request.authorization for request in service.requests} == {f"Bearer {KEY}"}
    _without_key(folder)


def _without_key(folder: RunFolder) -> None:
    """The key is in no file of the run and in no log of Ray."""
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    files = [path for root in (folder.path, logs) for path in root.rglob("*") if path.is_file()]
    assert any(path.name == "judge_cache.sqlite" for path in files) and any(path.parent == logs for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_teacher_alone(ray_cluster, tiny_model, tiny_teacher, tmp_path):
    """With the exact KL in the loss and no reward the policy approaches the teacher."""
    settings = config(
        tmp_path, tiny_model, "taught", steps=4,
        algorithm={"advantage": "none", "kl": {"placement": "none"}},
        reward={"model": None},
        teacher={"model": str(tiny_teacher), "mode": "full_vocabulary"},
    )  # fmt: skip
    records = read_metrics(run(settings).metrics)
    assert records[-1]["teacher/kl"] < 0.8 * records[0]["teacher/kl"]
    assert "reward/mean" not in records[0] and "kl/sequence" not in records[0]
    assert all(record["policy/loss"] == pytest.approx(record["teacher/kl"], rel=1e-4) for record in records)
