"""PPO with adapters on the real engines: published merged and separately, with and without reference workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlhf_ray.config import RunConfig, parse_config
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.stages.run import run

STEPS = 3
REWARD = """
def vowels(prompts, responses, metadata):
    return [sum(map(response.count, "aeiou")) / 10 for response in responses]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with prompts and a reward function."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"prompt": [{"role": "user", "content": f"Hello, where is my order {number}?"}]} for number in range(30)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards_for_adapters.py").write_text(REWARD)
    return folder


def config(folder: Path, inputs: Path, model: Path, publish: str) -> RunConfig:
    """GRPO with a KL term in the loss. Separate adapters are combined with the reference in the learner and an evaluation."""
    workers, alone = {"cpus": 0.1}, publish == "adapter"
    return parse_config(
        {
            "name": publish,
            "folder": str(folder),
            "stages": ["ppo", "evaluation"] if alone else ["ppo"],
            "model": {"path": str(model)},
            "data": {
                "prompts": {"location": str(inputs / "prompts.jsonl")},
                "max_prompt_tokens": 80,
                "max_dialogue_tokens": 96,
            },
            "evaluation": {"prompts": 4},
            "ppo": {
                "steps": STEPS,
                "batch_size": 16,
                "samples_per_prompt": 4,
                "minibatches": 2,
                "checkpoint": {"every": 1, "keep": 3},
                "share_reference": alone,
                "algorithm": {"advantage": "grpo", "kl": {"placement": "loss", "estimator": "k3"}},
                "rollout": {
                    "workers": workers,
                    "kv_cache_gb": 0.05,
                    "sampling": {"max_new_tokens": 16},
                    "weights": {"lora": publish, "bucket_mb": 0.05},
                },
                "policy": {
                    "workers": workers | {"count": 2 if alone else 1},
                    "sharding": {"zero_stage": 3 if alone else 1},
                    "optimizer": {"learning_rate": 1e-2},
                    "lora": {"rank": 4, "alpha": 16},
                },
                "reference": {"workers": workers},
                "reward": {
                    "model": None,
                    "workers": workers | {"env": {"PYTHONPATH": str(inputs)}},
                    "functions": [{"name": "vowels", "function": "rewards_for_adapters:vowels"}],
                },
            },
        }
    )


@pytest.fixture(scope="module", params=["merged", "adapter"])
def finished(request, ray_cluster, tmp_path_factory, inputs, tiny_model) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(inputs))
        return run(config(tmp_path_factory.mktemp("runs"), inputs, tiny_model, request.param))


def test_the_engine_has_the_weights_of_the_learner(finished):
    """Oracle 24 after every weight synchronisation, on the trained tokens."""
    records = read_metrics(finished.metrics)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert all(record["engine/logprob_difference_max"] < 1e-4 for record in records)
    assert records[0]["kl/sequence"] == pytest.approx(0, abs=1e-4), "the reference is the base"
    assert abs(records[-1]["kl/sequence"]) > 1e-4


@torch.no_grad()
def test_the_policy_is_written_merged_and_as_an_adapter(finished, tiny_model):
    tokens = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = base(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(finished.policy)(tokens).logits
    by_peft = PeftModel.from_pretrained(base, finished.policy / "adapter")(tokens).logits
    torch.testing.assert_close(by_peft, merged, rtol=0, atol=1e-4)
    assert (merged - before).abs().max() > 1e-3
