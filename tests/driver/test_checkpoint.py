"""Checkpoints are complete or ignored, and every damage is found before anything is loaded."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from rlhf_ray.algorithms.kl import AdaptiveKL, FixedKL
from rlhf_ray.config.algorithm import KLConfig
from rlhf_ray.driver import checkpointer
from rlhf_ray.driver.checkpointer import Checkpointer, TrainingState, load_state, newest
from rlhf_ray.driver.hooks import LoopHook
from rlhf_ray.runs import atomic_checkpoint
from rlhf_ray.runs.atomic_checkpoint import NotACheckpoint

FILES = {"policy/model.safetensors": b"weights", "policy_learner/state/rank_0.pt": bytes(range(256)), "empty": b""}


def state(step: int) -> TrainingState:
    return TrainingState(step, 4 * step, FixedKL(0.1))


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


class Learner:
    """A learner group that writes files by hand."""

    def __init__(self) -> None:
        self.loaded: list[Path] = []

    async def save_checkpoint(self, folder: Path) -> None:
        write(folder / "state" / "rank_0.pt", FILES["policy_learner/state/rank_0.pt"])

    async def save_pretrained(self, folder: Path) -> None:
        write(folder / "model.safetensors", FILES["policy/model.safetensors"])

    async def load_checkpoint(self, folder: Path) -> None:
        self.loaded.append(folder)


class Hook(LoopHook):
    """A hook with an empty file."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.restored = error, []

    async def save(self, folder: Path) -> None:
        write(folder / "empty", FILES["empty"])
        if self.error is not None:
            raise self.error

    async def restore(self, folder: Path) -> None:
        self.restored.append(folder)


def checkpointer_of(folder: Path, keep: int = 2, hook: LoopHook | None = None) -> Checkpointer:
    return Checkpointer(folder, {"policy": Learner()}, hook or Hook(), keep, "f" * 64)


def save(folder: Path, step: int, keep: int = 2, hook: LoopHook | None = None) -> Path:
    return asyncio.run(checkpointer_of(folder, keep, hook).save(state(step)))


def refused(path: Path) -> str:
    with pytest.raises(NotACheckpoint) as caught:
        load_state(path)
    return str(caught.value)


def no_damage(reason: str) -> None:
    raise AssertionError(reason)


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path, 3)
    assert path == tmp_path / "step_3" and load_state(path) == state(3)
    assert all((path / name).read_bytes() == content for name, content in FILES.items())
    assert newest(tmp_path, no_damage) == (path, state(3))


def test_learners_and_hooks_are_restored(tmp_path):
    hook = Hook()
    restoring = checkpointer_of(tmp_path, hook=hook)
    learners = restoring.learners | {"value": Learner()}
    restoring.learners = learners
    path = asyncio.run(restoring.save(state(1)))
    assert (path / "value_learner" / "state" / "rank_0.pt").is_file()
    asyncio.run(restoring.restore(path))
    assert [learner.loaded for learner in learners.values()] == [[path / "policy_learner"], [path / "value_learner"]]
    assert hook.restored == [path]


def test_the_state_of_an_older_version_is_read(tmp_path):
    """Before groups could be unfinished, state.json had four fields."""
    fields = {"step": 2, "next_group": 8, "kl": {"kind": "fixed", "beta": 0.1}, "config_sha256": "f" * 64}
    temporary = atomic_checkpoint.begin(tmp_path, 2)
    (temporary / checkpointer.STATE).write_text(json.dumps(fields))
    assert load_state(atomic_checkpoint.seal(temporary)) == state(2)


EVERY_FILE = [*FILES, checkpointer.STATE]


@pytest.mark.parametrize("name", [name for name in EVERY_FILE if FILES.get(name) != b""])
def test_a_flipped_bit_is_found(tmp_path, name):
    path = save(tmp_path, 1)
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    assert f"{name} does not match its SHA-256" in refused(path)


@pytest.mark.parametrize("name", [name for name in EVERY_FILE if FILES.get(name) != b""])
def test_a_truncated_file_is_found(tmp_path, name):
    path = save(tmp_path, 1)
    (path / name).write_bytes((path / name).read_bytes()[:-1])
    assert f"{name} does not match its SHA-256" in refused(path)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_missing_file_is_found(tmp_path, name):
    path = save(tmp_path, 1)
    (path / name).unlink()
    assert f"{name} is missing" in refused(path)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    path = save(tmp_path, 1)
    (path / atomic_checkpoint.MANIFEST).unlink()
    assert "is not a checkpoint: it has no manifest.json" in refused(path)
    assert "is not a checkpoint" in refused(tmp_path / "nowhere")


def test_no_damage_of_the_manifest_itself_escapes(tmp_path):
    """Every single flipped bit: the checkpoint is refused, or what is loaded is what was saved; nothing else is raised."""
    path = save(tmp_path, 1)
    manifest = path / atomic_checkpoint.MANIFEST
    whole = manifest.read_bytes()
    refusals = 0
    for position in range(len(whole)):
        for bit in (0, 3, 7):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            manifest.write_bytes(damaged)
            try:
                assert load_state(path) == state(1)
            except NotACheckpoint:
                refusals += 1
    assert refusals > 2 * len(whole), "most bits matter"
    for text in ("", "[]", "{}", "null", '{"state.json": 3}'):
        manifest.write_text(text)
        refused(path)


def test_a_state_of_another_version_is_refused(tmp_path):
    path = save(tmp_path, 1)
    fields = json.loads((path / checkpointer.STATE).read_text()) | {"new_field": 1}
    (path / checkpointer.STATE).write_text(json.dumps(fields))
    manifest = json.loads((path / atomic_checkpoint.MANIFEST).read_text())
    manifest[checkpointer.STATE] = checkpointer.fingerprint(json.dumps(fields))
    (path / atomic_checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert "new_field" in refused(path)


def test_a_damaged_checkpoint_is_skipped_and_reported(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step, keep=3)
    (tmp_path / "step_10" / "policy" / "model.safetensors").write_bytes(b"other")
    reasons: list[str] = []
    assert newest(tmp_path, reasons.append) == (tmp_path / "step_2", state(2))
    assert len(reasons) == 1 and "step_10" in reasons[0]


def test_if_all_are_damaged_the_run_does_not_start_again_silently(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "empty").unlink()
    with pytest.raises(NotACheckpoint, match="none of the 2 checkpoints in .* is intact; restore one"):
        newest(tmp_path, lambda reason: None)


def test_no_checkpoints_at_all(tmp_path):
    assert newest(tmp_path, no_damage) is None
    assert newest(tmp_path / "not there", no_damage) is None


def test_a_crash_while_saving_leaves_the_older_one(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 2, hook=Hook(OSError("disk full")))
    assert (tmp_path / "tmp_step_2" / "empty").is_file(), "left as the crash left it"
    assert newest(tmp_path, no_damage) == (tmp_path / "step_1", state(1))
    save(tmp_path, 2)
    assert newest(tmp_path, no_damage) == (tmp_path / "step_2", state(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]


def test_what_a_crash_left_of_the_temporary_folder_never_gets_into_the_next_one(tmp_path):
    (tmp_path / "tmp_step_2").mkdir()
    (tmp_path / "tmp_step_2" / "leftover").write_text("x")
    assert not (save(tmp_path, 2) / "leftover").exists()


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_100", "step_15"]


def test_a_damaged_newer_one_does_not_push_out_the_good_ones(tmp_path):
    """A run that fell back from step 20 to 10 and saves 12 must not delete 10 or 12 in favour of the damaged 20."""
    save(tmp_path, 10)
    (save(tmp_path, 20) / "empty").unlink()
    save(tmp_path, 12)
    (tmp_path / "step_12" / "empty").unlink()
    assert newest(tmp_path, lambda reason: None) == (tmp_path / "step_10", state(10))
    save(tmp_path, 14, keep=1)
    assert newest(tmp_path, lambda reason: None) == (tmp_path / "step_14", state(14))


def test_the_same_step_again_replaces(tmp_path):
    save(tmp_path, 1)
    shutil.rmtree(tmp_path / "step_1" / "policy")
    assert load_state(save(tmp_path, 1)) == state(1)


@pytest.mark.parametrize("kl", [KLConfig(coefficient=0.2), KLConfig(coefficient=0.2, target=4.0, horizon=100)])
def test_training_state_survives(kl):
    begun = TrainingState.initial(kl)
    advanced = begun.advance(9.0, 50, next_group=17).advance(None, 50, next_group=30)
    assert TrainingState.from_dict(json.loads(json.dumps(advanced.to_dict()))) == advanced
    assert advanced.step == 2 and advanced.next_group == 30
    if kl.target is None:
        assert advanced.kl == FixedKL(0.2)
    else:
        assert isinstance(advanced.kl, AdaptiveKL) and advanced.kl.beta == pytest.approx(0.2 * (1 + 0.2 * 0.5))


def test_a_resumed_run_admits_what_the_interrupted_one_would_have(tmp_path):
    """Two steps of three groups, one of which was dropped: the next batch begins at group 7."""
    resumed = TrainingState.initial(KLConfig()).advance(None, 3, 4).advance(None, 3, 7).admission(3, staleness=0)
    assert list(resumed.admit()) == [7, 8, 9] and not resumed.admit()


def test_groups_that_were_not_finished_survive_and_come_first(tmp_path):
    """With staleness 1 a run stops while some groups are under way: they are generated again, then what comes next."""
    stopped = TrainingState.initial(KLConfig()).advance(None, 2, next_group=7, unfinished=(3, 5))
    asyncio.run(checkpointer_of(tmp_path).save(stopped))
    resumed = load_state(tmp_path / "step_1")
    assert resumed == stopped
    assert resumed.admission(2, staleness=1).admit() == [3, 5, 7, 8]
