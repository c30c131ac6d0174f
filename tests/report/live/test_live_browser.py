"""The live page as a person sees it: Ray Serve behind it, headless Chromium in front of it."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

import pytest

from rlhf_ray.report.live.app import AlreadyWatched, LiveSite
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.metrics import MetricsLog
from rlhf_ray.runs.run_folder import RunFolder

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no browser: install chromium, chromium-browser or google-chrome to run these tests"
)
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
SOON_MS = 15_000
"""A refresh is two seconds; a busy machine takes longer."""


class Growing:
    """A run whose stage is still writing."""

    def __init__(self, root: Path, name: str, reward: float) -> None:
        self.folder, self.reward, self.step = RunFolder(root / name), reward, 0
        self.folder.path.mkdir(parents=True)
        self.folder.config.write_text(f"name: {name}\nstages: [ppo]\nppo: {{steps: 50, temperature: {reward}}}\n")
        self.log = MetricsLog(self.folder)
        with EventLog(self.folder.events) as events:
            events.emit("stage", "ppo begins")
        self.grow(3)

    def grow(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.step += 1
            figures = {"reward/mean": self.reward * self.step, "kl/sequence": 0.5, "time/step_s": 2.0}
            self.log.log(self.step, figures | {"time/rollout_s": 1.5})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("watched runs")


@pytest.fixture(scope="module")
def address(ray_cluster, root):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    site = LiveSite.open(root, "127.0.0.1", port, "KEYS_THAT_NOBODY_SET", shared=False)
    assert site.keys is None and site.start() == f"http://127.0.0.1:{port}/"
    yield f"http://127.0.0.1:{port}/"
    site.stop()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, address):
    """A tab; whatever its console complains of is a failure."""
    context = chromium.new_context(base_url=address, viewport={"width": 1280, "height": 900})
    context.set_default_timeout(SOON_MS)
    page, complaints = context.new_page(), []
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    context.close()
    assert complaints == []


@pytest.fixture
def shows():
    """Waits until a locator shows a text."""
    from playwright.sync_api import expect

    return lambda locator, text: expect(locator).to_contain_text(text, timeout=SOON_MS)


@pytest.fixture
def run(root, request):
    made = Growing(root, request.node.name.removeprefix("test_").split("[")[0], reward=0.1)
    yield made
    made.log.close()
    shutil.rmtree(made.folder.path, ignore_errors=True)


@pytest.fixture
def other(root, run):
    made = Growing(root, "another", reward=0.3)
    yield made
    made.log.close()
    shutil.rmtree(made.folder.path)


def test_a_step_appears_without_a_reload_and_what_was_opened_stays(page, shows, run):
    page.goto(f"runs?run={run.folder.name}")
    page.evaluate("document.loadedOnce = true")
    chart = page.locator("svg.chart[aria-label='Reward']")
    before = chart.locator("polyline").first.get_attribute("points")
    assert len(before.split()) == 3
    page.locator("#config summary").click()
    run.grow()
    shows(page.locator("#top"), "4 PPO steps")
    assert len(chart.locator("polyline").first.get_attribute("points").split()) == 4
    assert page.evaluate("document.loadedOnce") is True
    assert page.locator("#config details").get_attribute("open") is not None
    chart.hover()
    shows(page.locator(".tip"), "step ")


def test_an_idle_page_is_not_sent_again(page, run):
    answers = []
    page.on("response", lambda answer: answers.append(answer.status))
    page.goto(f"runs?run={run.folder.name}")
    for _ in range(3):
        page.wait_for_event("response", timeout=SOON_MS)
    assert answers[:2] == [200, 200] and set(answers[2:]) == {304}


def test_runs_are_chosen_compared_and_left_again(page, shows, run, other):
    page.goto("")
    shows(page.locator("h1"), "2 runs")
    for name in (run.folder.name, "another"):
        page.get_by_label(f"choose {name}").check()
    other.grow()
    shows(page.locator("table.runs"), "4 of 50")
    assert page.locator("input:checked").count() == 2, "a refresh leaves what was chosen"
    page.get_by_role("button", name="Compare").click()
    shows(page.locator(".legend"), "another")
    assert page.locator("svg.chart[aria-label='Reward'] polyline").count() == 2
    shows(page.locator("#configuration"), "ppo.temperature")
    other.grow()
    shows(page.locator("#figures"), "5")
    page.locator(".legend").get_by_role("link", name="another").click()
    shows(page.locator("h1"), "another")
    page.get_by_role("link", name="All runs").click()
    shows(page.locator("h1"), "2 runs")


def test_damage_and_the_end_of_a_run_are_shown(page, shows, run):
    page.goto(f"runs?run={run.folder.name}")
    with open(run.folder.metrics, "a") as file:
        file.write("<script>damaged</script>\n")
    shows(page.locator("#problems"), "metrics.jsonl, line 4: not JSON")
    page.goto("")
    shutil.rmtree(run.folder.path)
    shows(page.locator("main"), "No run has begun here yet")


def test_a_server_that_does_not_answer_is_reported_and_waited_for(chromium, address, shows, run):
    context = chromium.new_context(base_url=address)
    page = context.new_page()
    page.goto(f"runs?run={run.folder.name}")
    shows(page.locator(".live"), "live")
    context.set_offline(True)
    shows(page.locator(".live"), "retrying")
    assert page.locator("svg.chart").count() > 2, "what was seen stays"
    run.grow()
    context.set_offline(False)
    shows(page.locator("#top"), "4 PPO steps")
    shows(page.locator(".live"), "live")
    context.close()


@pytest.mark.parametrize(("scheme", "paper"), [("light", "rgb(246, 247, 249)"), ("dark", "rgb(15, 18, 23)")])
def test_light_and_dark(chromium, address, run, scheme, paper):
    context = chromium.new_context(base_url=address, color_scheme=scheme)
    page = context.new_page()
    page.goto(f"runs?run={run.folder.name}")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
    context.close()


def test_with_another_application_a_key_is_needed(chromium, address, root, shows, run):
    site = LiveSite.open(root, "127.0.0.1", 1, "KEYS_THAT_NOBODY_SET", shared=True)
    assert site.made_key is not None
    said = site.start()
    assert re.search(r"/watch/\?key=rlhf-", said)
    with pytest.raises(AlreadyWatched, match="already"):
        LiveSite.open(root, "127.0.0.1", 1, "KEYS_THAT_NOBODY_SET", shared=True)
    context = chromium.new_context(base_url=address)
    page = context.new_page()
    try:
        assert page.goto("watch/").status == 401
        assert run.folder.name not in page.content()
        page.get_by_label("key").fill(site.made_key)
        page.get_by_role("button", name="Open").click()
        shows(page.locator("h1"), "1 run")
        assert page.url == f"{address}watch/" and site.made_key not in page.content()
        (cookie,) = context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/watch/")
        page.get_by_role("link", name=run.folder.name).click()
        shows(page.locator("#top"), "3 PPO steps")
        run.grow()
        shows(page.locator("#top"), "4 PPO steps")
    finally:
        context.close()
        site.stop()
    assert chromium.new_context(base_url=address).new_page().goto("").status == 200, "the other one is still there"
