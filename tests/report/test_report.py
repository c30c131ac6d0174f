"""The report: loads nothing, escapes everything, and says what is missing."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest

from rlhf_ray.algorithms.reward_quality import measure_quality
from rlhf_ray.report import write_report
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder, atomic_write

EVALUATION = {
    "win_rate_vs_sft": 0.912,
    "win_rate_interval": [0.872, 0.941],
    "utility": {"base": -1.3, "sft": 0.4, "ppo": 2.2},
    "utility_std_sft": 1.2,
    "kl_sequence": 6.8,
    "reward_model_accuracy": 0.72,
    "reward_model_accuracy_ceiling": 0.8,
    "seconds": {"sft": 61.0, "ppo": 200.0},
}
VOID = {"meta", "line", "circle", "polygon", "polyline"}
ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'</style>{{ 7 * 7 }}"


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, the text, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def charts(self) -> dict[str, list]:
        """The data behind each chart by its title."""
        drawn = (attributes for tag, attributes in self.elements if tag == "svg")
        return {attributes["aria-label"]: json.loads(attributes["data-hover"]) for attributes in drawn}


def page_of(folder: RunFolder) -> Page:
    path = write_report(folder)
    assert path == folder.report
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "a <run> & more")
    folder.path.mkdir()
    return folder


def write_steps(folder, count, **figures):
    lines = (
        {"step": step, "timestamp": 1.7e9 + step, "reward/mean": step / count, **figures}
        for step in range(1, count + 1)
    )
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_everything(folder, text="It is on its way."):
    phases = {"time/step_s": 1.5, "time/rollout_s": 1.0, "time/update_s": 0.4, "idle/learner": 0.7}
    write_steps(folder, 30, **phases, **{"value/loss": 0.1, "reward/part/" + text: 0.5})
    atomic_write(folder.evaluation, json.dumps(EVALUATION))
    sample = {
        "prompt": [{"role": "user", "content": f"Where is it? {text}"}],
        "answers": {"base": "", "sft": "Sorry.", "ppo": text},
        "rewards": {"base": -2.0, "sft": 0.33, "ppo": None},
        "utility": None,
    }
    folder.evaluation_samples.write_text(json.dumps(sample) + "\n")
    with EventLog(folder.events) as log:
        log.emit("fault", f"rollout worker 1 died: {text}", reason=text, worker=1)
        log.emit("publication", "never listed", version=1)
    folder.config.write_text(f"name: quickstart # {text}\n")
    folder.sft.mkdir()
    folder.stage_metrics("sft").write_text('{"step": 1, "timestamp": 1, "loss": 3.0, "heldout/loss": 3.5}\n')


def test_empty_folder_gives_a_page_that_says_what_is_missing(folder):
    text = page_of(folder).text
    for missing in ("have not been evaluated", "No step has been recorded", "neither fine-tuning", "no config.yaml"):
        assert missing in text


def test_whole_run_is_shown(folder):
    write_everything(folder)
    page = page_of(folder)
    for told in ("a <run> & more", "30 PPO steps", "91.2\u202f%", "1.5 standard deviations above SFT", "6.8\xa0nats",
                 "90.0\u202f%", "4m21s", "It is on its way.", "an empty answer", "rollout worker 1 died",
                 "worker=1", "1 publication", "name: quickstart"):  # fmt: skip
        assert told in page.text
    assert "never listed" not in page.text
    assert {"Reward", "Time per step", "Idle share", "Loss"} <= page.charts().keys()
    assert re.search(r"Not recorded in this run: [^.]*Entropy", page.text)


def test_page_loads_nothing_from_anywhere(folder):
    write_everything(folder)
    page = page_of(folder)
    html = folder.report.read_text()
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html and "@import" not in html
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")


def test_texts_of_models_and_files_are_escaped(folder):
    write_everything(folder, ATTACK)
    page = page_of(folder)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    for place in ("Where is it? ", "rollout worker 1 died: ", "reason=", "name: quickstart # "):
        assert place + ATTACK in page.text
    assert "Reward by source" in page.charts()
    assert page.charts()["Reward by source"][0]["label"] == ATTACK


def test_only_the_script_of_the_page_may_run(folder):
    page = page_of(folder)
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/]{43}='$", policy)


@pytest.mark.parametrize("missing", [*EVALUATION, "all"])
@pytest.mark.parametrize("null", [True, False])
def test_figures_that_were_not_measured_are_shown_as_missing(folder, missing, null):
    kept = {key: value for key, value in EVALUATION.items() if missing not in (key, "all")}
    absent = {key: None for key in EVALUATION.keys() - kept.keys()} if null else {}
    atomic_write(folder.evaluation, json.dumps(kept | absent))
    text = page_of(folder).text
    cards = {"win_rate_vs_sft", "utility", "kl_sequence", "reward_model_accuracy", "seconds"} - kept.keys()
    assert text.count("—") == len(cards)
    assert ("only a simulated annotator" in text) == ("utility" not in kept)


def test_partly_known_utility_is_shown(folder):
    atomic_write(folder.evaluation, json.dumps({"utility": {"base": None, "sft": 0.5, "ppo": None}}))
    assert "0.5" in page_of(folder).text


@pytest.mark.parametrize("count", [1, 2, 79, 10_000])
def test_curves_of_any_length(folder, count):
    write_steps(folder, count, **{"time/step_s": 1.0, "time/rollout_s": 0.5, "kl/sequence": 0.0})
    charts = page_of(folder).charts()
    (reward,) = charts["Reward"]
    assert reward["step"][0] == 1 and reward["step"][-1] == count
    assert len(reward["step"]) == min(count, 240)
    assert {series["label"] for series in charts["Time per step"]} == {"rollout", "step"}
    assert folder.report.stat().st_size < 400_000


def write_faults(folder, *times):
    lines = ({"time": time, "kind": "fault", "message": "a worker died", "fields": {}} for time in times)
    folder.events.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_faults_are_a_curve_that_ends_with_all_of_them(folder):
    write_steps(folder, 4)
    write_faults(folder, 1.7e9 + 1.5, 1.7e9 + 3, 1.7e9 + 60)
    page = page_of(folder)
    (faults,) = page.charts()["Faults so far"]
    assert (faults["step"], faults["text"]) == ([1, 2, 3, 4], ["0", "1", "2", "3"])
    assert "3 fault" in page.text, "as the events say"


def test_a_run_without_a_fault_shows_so(folder):
    write_steps(folder, 3)
    assert page_of(folder).charts()["Faults so far"][0]["text"] == ["0", "0", "0"]


def test_null_values_are_left_out_of_a_curve_and_counted(folder):
    lines = [{"step": step, "timestamp": 1, "value/loss": None if step == 2 else 0.5} for step in (1, 2, 3)]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(folder)
    assert page.charts()["Value loss"][0]["step"] == [1, 3]
    assert "1 recorded value was not a finite number" in page.text


def test_metric_that_never_was_a_number_is_listed_as_not_recorded(folder):
    folder.metrics.write_text('{"step": 1, "timestamp": 1, "policy/entropy": null}\n')
    assert re.search(r"Not recorded in this run: [^.]*Entropy", page_of(folder).text)


def test_damaged_file_is_named(folder):
    folder.evaluation.write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json"):
        write_report(folder)


def test_same_folder_gives_the_same_page(folder):
    write_everything(folder)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


def test_the_reward_models_quality_is_drawn(tmp_path):
    generator = np.random.default_rng(0)
    rewards, lengths = generator.normal(size=200), generator.integers(5, 50, 200)
    better, worse = np.arange(0, 200, 2), np.arange(1, 200, 2)
    groups, people = ["clerks", "nurses"] * 50, [f"person {index % 3}" for index in range(100)]
    measured = measure_quality(rewards, lengths, better, worse, False, groups, people)
    quality = asdict(replace(measured, members=3, disagreement=0.25))
    folder = RunFolder(tmp_path / "run")
    folder.reward_model.mkdir(parents=True)
    folder.reward_quality.write_text(json.dumps(quality))
    page = write_report(folder).read_text()
    assert "How far the reward model can be trusted" in page and "“shorter is better”" in page
    assert "The mean of 3 members, which differ by 0.25 standard deviations" in page
    assert all(name in page for name in ("clerks", "nurses", "person 2")), "each with its accuracy"
    assert f"{100 * quality['accuracy']['value']:.1f}" in page and page.count("<circle") >= 10 + 4
