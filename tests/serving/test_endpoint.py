"""An endpoint on real engines, with OpenAI's own client: responses, refusals, and versions that change under load."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import ray
import torch
from ray import serve
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.config import RunConfig, parse_config
from rlhf_ray.config.loading import load_serving
from rlhf_ray.models.loading import load_scalar_model
from rlhf_ray.rewards.http_reward import parse_scores
from rlhf_ray.runs.events import read_events
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.serving.deploying import NotStarted, RouteTaken
from rlhf_ray.serving.endpoint import Endpoint, EndpointTaken, NoEndpoint
from rlhf_ray.serving.gateway import HEADER
from rlhf_ray.serving.guard import digest
from rlhf_ray.serving.versions import Version, VersionError, Versions
from rlhf_ray.stages.run import run
from rlhf_ray.telemetry.prometheus import SERVING_METRICS
from tests.exporter import names_of, scrape

KEY = "a-key-of-the-test-suite"
CHAT = [{"role": "user", "content": "Hello, where is my order 1234?"}]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def other_policy(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with changed weights, as after training."""
    folder = tmp_path_factory.mktemp("policies") / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_model(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rewards") / "model"
    model = load_scalar_model(tiny_model, seed=3)
    model.config.reward_mean, model.config.reward_std = 0.1, 2.0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other_node(s3_server, tmp_path_factory) -> dict[str, str]:
    """Environment of processes that share an object store with the driver, and no folder."""
    shared = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return shared | {"RLHF_RAY_WORKING_FOLDER": str(tmp_path_factory.mktemp("node"))}


@pytest.fixture(scope="module")
def endpoint(ray_cluster, tiny_model, reward_model, other_node):
    config = load_serving(
        None,
        [
            f"policy.workers.env={json.dumps(other_node)}",
            "name=test-policy", "gateways=2", f"port={free_port()}", f"reward_model={reward_model}", "policy.kv_cache_gb=0.1",
            "policy.workers.cpus=0.2", "rewards.cpus=0.1", "limits.max_tokens=24", "limits.requests_per_minute=100000",
            "cors_origins=[https://example.org]",
        ],
    )  # fmt: skip
    endpoint = Endpoint(config, {digest(KEY): "suite"}, {"env_vars": {"OF_THE_ENDPOINT": "1"}})
    with pytest.raises(NoEndpoint, match="no endpoint 'test-policy'"):
        Endpoint.attach("test-policy")
    endpoint.start(Version("first", str(tiny_model)))
    yield endpoint
    serve.shutdown()


@pytest.fixture
def url(endpoint) -> str:
    return f"http://127.0.0.1:{endpoint.config.port}/v1"


@pytest.fixture
def client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60)


def test_chat_returns_the_models_response(client, tiny_model):
    answer = client.chat.completions.create(model="test-policy", messages=CHAT, temperature=0, max_tokens=8)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    # An engine holds back a character until all of its bytes are there.
    assert answer.choices[0].message.content == tokenizer.decode(expected, skip_special_tokens=True).rstrip("\ufffd")
    assert answer.model == "first" and answer.usage.completion_tokens <= 8


def test_streaming_seeds_completions_and_models(client):
    def streamed() -> list[str]:
        stream = client.chat.completions.create(
            model="test-policy", messages=CHAT, max_tokens=12, seed=5, temperature=1, stream=True
        )
        return [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]

    pieces = streamed()
    # Tokens that are generated between two reads arrive in one chunk.
    assert len(pieces) > 1 and "".join(streamed()) == "".join(pieces), "the same seed, the same answer"
    whole = client.chat.completions.create(model="test-policy", messages=CHAT, max_tokens=12, seed=5, temperature=1)
    assert whole.choices[0].message.content == "".join(pieces)
    many = client.completions.create(model="first", prompt="Hello", n=3, max_tokens=4)
    assert len(many.choices) == 3 and many.model == "first"
    assert [model.id for model in client.models.list()] == ["test-policy", "first"]
    unsaid = client.chat.completions.create(model="first", messages=CHAT, extra_body={"ignore_eos": True})
    assert unsaid.usage.completion_tokens == 24, "the endpoint's limit, where the client sets none"


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"model": "nobody"}, 404, "there is no model 'nobody'; choose one of test-policy, first"),
        ({"max_tokens": 25}, 400, "from 1 to 24 are allowed"),
        ({"max_completion_tokens": 0}, 400, "from 1 to 24 are allowed"),
        ({"n": 5}, 400, "at most 4 are allowed"),
        ({"messages": "no list"}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "Hello " * 200}]}, 400, "128"),
    ],
)
def test_impossible_requests_are_refused(client, request_, status, message):
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**{"model": "test-policy", "messages": CHAT} | request_)
    assert refused.value.status_code == status and message in str(refused.value)


def test_keys_and_cross_origin_requests(url):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="somebody-elses-key", max_retries=0).models.list()
    headers = (
        "authorization, content-type, x-stainless-lang"  # OpenAI's client for browsers sends more of the last kind
    )
    asks = {"access-control-request-method": "POST", "access-control-request-headers": headers}
    page = httpx.options(f"{url}/chat/completions", headers=asks | {"origin": "https://example.org"})
    assert page.status_code == 200 and page.headers["access-control-allow-origin"] == "https://example.org"
    other = httpx.options(f"{url}/chat/completions", headers=asks | {"origin": "https://elsewhere.net"})
    assert "access-control-allow-origin" not in other.headers
    assert httpx.get(url.removesuffix("/v1") + "/health").json() == {"status": "ok"}


def test_scores_are_the_reward_models(url, reward_model):
    """In the format that the HTTP reward of another run reads."""
    body = {"prompts": [CHAT, CHAT], "responses": ["On Monday.", "I am sorry."], "metadata": [{}, {}]}
    headers = {"authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{url}/score", json=body, headers=headers)
    scores = parse_scores(answer.json(), 2)
    tokenizer, model = AutoTokenizer.from_pretrained(reward_model), load_scalar_model(reward_model).eval()
    for response, score in zip(body["responses"], scores, strict=True):
        text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
        ids = [
            *tokenizer(text, add_special_tokens=False)["input_ids"],
            *tokenizer(response)["input_ids"],
            tokenizer.eos_token_id,
        ]
        with torch.no_grad():
            raw = model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()
        assert score == pytest.approx((raw - 0.1) / 2.0, abs=1e-4)
    for wrong in (
        {"responses": ["one"]},
        {"prompts": [CHAT, [{}]]},
        {"prompts": [CHAT, []]},
        {"responses": ["a", "b " * 200]},
    ):
        assert httpx.post(f"{url}/score", json=body | wrong, headers=headers).status_code == 400


def test_the_metrics_of_the_dashboard_are_exported(url, client):
    """With the same names and labels, after requests that were answered, scored and refused."""
    client.chat.completions.create(model="test-policy", messages=CHAT, max_tokens=2)
    headers = {"authorization": f"Bearer {KEY}"}
    httpx.post(
        f"{url}/score", json={"prompts": [CHAT], "responses": ["On Monday."]}, headers=headers
    ).raise_for_status()
    assert httpx.get(f"{url}/models").status_code == 401
    applications = {f"test-policy.{part}" for part in ("gateway", "first", "reward-model")}
    wanted = {series for metric in SERVING_METRICS for series in metric.series}

    def working(series: dict[str, float]) -> set[str]:
        done = (name for name in series if name.startswith("ray_serve_deployment_request_counter_total{"))
        return {application for name in done for application in applications if f'application="{application}"' in name}

    series = scrape(lambda series: wanted <= names_of(series) and working(series) == applications)
    assert not wanted - names_of(series) and working(series) == applications
    for metric in SERVING_METRICS:
        labels = next(name for name in series if name.startswith(f"{metric.series[0]}{{"))
        assert all(f'{label}="' in labels for label in metric.labels), labels


class Load:
    """Clients that send requests all the time, and count versions and failures."""

    def __init__(self, url: str, clients: int) -> None:
        self.url, self.answers, self.failures = url, Counter(), []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, answers: int) -> Counter:
        """The versions of the next `answers` responses."""
        before = self.answers.copy()
        while sum((self.answers - before).values()) < answers and not self.failures:
            self._stop.wait(0.05)
        return self.answers - before

    def _ask(self) -> None:
        client = openai.OpenAI(base_url=self.url, api_key=KEY, max_retries=0, timeout=120)
        while not self._stop.is_set():
            try:
                answer = client.chat.completions.with_raw_response.create(
                    model="test-policy", messages=CHAT, max_tokens=16
                )
                assert answer.parse().model == answer.headers[HEADER]
                self.answers[answer.headers[HEADER]] += 1
            except Exception as error:
                self.failures.append(error)


@pytest.fixture
def command(monkeypatch):
    """Runs `rlhf-ray …` in a process that is connected already."""
    monkeypatch.setattr("rlhf_ray.cli.serve._connect", lambda address: None)
    return lambda *arguments: CliRunner().invoke(app, [*arguments, "--name", "test-policy"], catch_exceptions=False)


def test_versions_change_and_no_request_is_lost(endpoint, url, client, command, tiny_model, other_policy):
    second = Version("second", str(other_policy))
    replicas = gateways()
    assert len(replicas) == endpoint.config.gateways == 2
    with Load(url, clients=4) as load:
        assert command("publish", str(other_policy), "--canary", "30%", "--label", "second").exit_code == 0
        attached = Endpoint.attach("test-policy")
        assert attached.versions == Versions(Version("first", str(tiny_model)), second, 0.3)
        shared = load.wait_for(90)
        assert 0.1 < shared["second"] / shared.total() < 0.55
        output = command("versions").output
        assert "first" in output and "second" in output and "30" in output
        command("promote")
        assert attached.versions.stable == second
        assert set(load.wait_for(20)) == {"second"}
        own = client.chat.completions.create(model="first", messages=CHAT, max_tokens=2)
        assert own.model == "first", "the version before is there to go back to"
        command("rollback")
        assert attached.versions.stable.name == "first"
        assert set(load.wait_for(20)) == {"first"}
    assert gateways() == replicas, "they were told, and not replaced"
    assert load.failures == [] and load.answers.total() > 130
    one = np.unique(
        [client.chat.completions.create(model="test-policy", messages=CHAT, user="u").model for _ in range(5)]
    )
    assert one.tolist() == ["first"]


def gateways() -> set[str]:
    """Names of the gateway's actors, which are unique."""
    named = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    return {name for name in named if "test-policy.gateway" in name}


@pytest.mark.parametrize("label", ["gateway", "reward-model", "test-policy"])
def test_versions_cannot_have_the_name_of_a_part_of_the_endpoint(endpoint, command, other_policy, label):
    with pytest.raises(VersionError, match="--label"):
        command("publish", str(other_policy), "--label", label)


def test_a_served_version_is_not_overwritten(endpoint, tiny_model):
    version = Version("third", str(tiny_model))
    with pytest.raises(EndpointTaken, match="already serves 'test-policy'"):
        Endpoint(endpoint.config, None).start(version)
    with pytest.raises(EndpointTaken, match=f"set host=127.0.0.1 port={endpoint.config.port}"):
        Endpoint(endpoint.config.model_copy(update={"name": "other", "port": 1}), None).start(version)
    with pytest.raises(RouteTaken, match="rlhf-ray unserve"):
        Endpoint(endpoint.config.model_copy(update={"name": "other"}), None).start(version)
    with pytest.raises(NoEndpoint):
        Endpoint.attach("other")


def test_waiting_for_engines_without_room_ends(endpoint, tiny_model, caplog):
    workers = endpoint.config.policy.workers.model_copy(update={"cpus": 1000})
    policy = endpoint.config.policy.model_copy(update={"workers": workers})
    limits = endpoint.config.limits.model_copy(update={"timeout_s": 1.0})
    asks_too_much = endpoint.config.model_copy(update={"policy": policy, "limits": limits, "start_s": 2.0})
    too_large = Endpoint(asks_too_much, endpoint.keys, endpoint.runtime_env)
    with pytest.raises(NotStarted, match=r"test-policy.large was not running after 2 s \(start_s\)"):
        too_large.publish(Version("large", str(tiny_model)))
    too_large.give_up = lambda: True  # as a run that is asked to stop
    with pytest.raises(NotStarted, match="test-policy.larger was given up"):
        too_large.publish(Version("larger", str(tiny_model)))
    assert Endpoint.attach("test-policy").versions.named("large") is None
    assert caplog.text and os.environ["AWS_SECRET_ACCESS_KEY"] not in caplog.text
    deadline = time.monotonic() + 60
    while {"test-policy.large", "test-policy.larger"} & serve.status().applications.keys():
        assert time.monotonic() < deadline, "what was given up is still asked for"
        time.sleep(0.2)


def run_that_publishes(
    name: str,
    endpoint: str,
    data: Path,
    model: Path,
    environment: dict[str, str],
    scores: str = "http://127.0.0.1:1/v1/score",
) -> RunConfig:
    """Two steps on a store; each passes the bar, which is very low. `scores`: the URL of a served reward model."""
    prompts = data / "prompts.jsonl"
    asked = [[{"role": "user", "content": f"Where is order {number}?"}] for number in range(32)]
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    reward = {
        "model": None,
        "functions": [{"name": "long", "function": "statistics_of_the_test:length"}],
        "http": [{"name": "served", "url": scores, "api_key_env": "KEY_OF_THE_ENDPOINT"}],
    }
    (data / "statistics_of_the_test.py").write_text(
        "def length(prompts, responses, metadata):\n    return [float(len(response)) for response in responses]\n"
    )
    workers = {"cpus": 0.1, "env": environment | {"PYTHONPATH": str(data)}}
    return parse_config(
        {
            "name": name,
            "folder": "s3://runs/published",
            "stages": ["ppo"],
            "model": {"path": str(model)},
            "data": {
                "prompts": {"location": str(prompts)},
                "held_out_fraction": 0.3,
                "max_prompt_tokens": 64,
                "max_dialogue_tokens": 96,
            },
            "ppo": {
                "steps": 2,
                "batch_size": 8,
                "samples_per_prompt": 2,
                "algorithm": {"advantage": "rloo", "kl": {"placement": "none"}},
                "rollout": {"workers": workers, "kv_cache_gb": 0.05, "sampling": {"max_new_tokens": 16}},
                "policy": {"workers": workers},
                "reward": reward | {"workers": workers},
                "publishing": {"endpoint": endpoint, "every": 2, "prompts": 8, "better_than": 0.0},
            },
        }
    )


def test_a_run_publishes_by_itself(endpoint, url, client, other_node, tiny_model, tmp_path, monkeypatch):
    """Its workers and the endpoint's engines cannot read the driver's folder: they load from the store. The reward model that the
    endpoint serves is part of the run's reward."""
    monkeypatch.setenv("KEY_OF_THE_ENDPOINT", KEY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("RLHF_RAY_WORKING_FOLDER", str(tmp_path / "work"))
    with pytest.raises(NoEndpoint, match="no endpoint 'another'"):
        run(run_that_publishes("lost", "another", tmp_path, tiny_model, other_node))
    folder = run(run_that_publishes("self-published", "test-policy", tmp_path, tiny_model, other_node, f"{url}/score"))
    releases = [event for event in read_events(folder.events) if event.kind == "release"]
    assert [event.fields["step"] for event in releases] == [2]
    first, second = read_metrics(folder.metrics)
    assert first["reward/part/served"] != 0 and first["service/served/requests"] > 0
    assert "publishing/win_rate" not in first and 0 < second["publishing/win_rate_low"] < second["publishing/win_rate"]
    answer = client.chat.completions.create(model="test-policy", messages=CHAT, temperature=0, max_tokens=8)
    assert answer.model == "self-published-2"
    kept = "published/step_2"
    assert Endpoint.attach("test-policy").versions.stable.folder == f"s3://runs/published/self-published#{kept}"
    (served,) = Path(other_node["RLHF_RAY_WORKING_FOLDER"]).glob(f"copies/*/self-published/{kept}/model.safetensors")
    assert served.read_bytes() == (folder.path / kept / "model.safetensors").read_bytes()
