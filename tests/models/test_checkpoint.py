import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raypipe import UsageError
from raypipe.data.location import Location
from raypipe.models import checkpoint as checkpoints
from raypipe.models.checkpoint import Checkpoint, Progress, load, save

ROOT = Path(__file__).parent.parent.parent


def made(**progress) -> Checkpoint:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return Checkpoint(
        settings={
            "model": {"name": "ssd_tiny"},
            "recipe": {"ops": [{"op": "Resize", "height": 300}]},
            "classes": [3, 90],
        },
        progress=Progress(**({"epoch": 1, "step": 7, "rows": 40, "images": 39} | progress)),
        seen={"version": 1, "epoch": 1, "seen": [[0, 2]], "rows": {"count": 40}},
        state={
            "model": layer.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": [{"cpu": torch.get_rng_state()}],
        },
    )


def test_what_is_kept_comes_back_equal(tmp_path):
    before = made(
        rejects=[{"image_id": "x", "uri": "x", "reason": "truncated", "detail": ""}],
        epochs=[{"loss": 1.5}],
    )
    save(str(tmp_path / "c"), before)
    after = load(str(tmp_path / "c"))
    assert (after.settings, after.progress, after.seen) == (
        before.settings,
        before.progress,
        before.seen,
    )
    assert after.progress.rejected == 1
    for name, tensor in before.state["model"].items():
        assert torch.equal(after.state["model"][name], tensor)
    assert torch.equal(after.state["random"][0]["cpu"], before.state["random"][0]["cpu"])
    moments = before.state["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(after.state["optimizer"]["state"][0]["exp_avg"], moments)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "about.json",
        "state.pt",
    ]


def test_a_folder_that_was_not_finished_is_no_checkpoint(tmp_path):
    def put(run: str, step: int) -> Path:
        one = made(step=step, rows=10 * step)
        folder = tmp_path / run / checkpoints.name_of(one.progress)
        save(str(folder), one)
        return folder

    for run, step in (("run-1", 3), ("run-1", 20), ("run-2", 5)):
        put(run, step)
    rest = put("run-2", 30)
    (rest / "about.json").unlink()
    found = [
        Path(folder).relative_to(tmp_path).as_posix()
        for folder in checkpoints.all_in(str(tmp_path))
    ]
    assert found == [
        "run-1/checkpoint-0001-000000003",
        "run-2/checkpoint-0001-000000005",
        "run-1/checkpoint-0001-000000020",
    ]
    checkpoints.prune(str(tmp_path), keep=checkpoints.all_in(str(tmp_path))[-1:])
    assert len(checkpoints.all_in(str(tmp_path))) == 1
    assert checkpoints.all_in(str(tmp_path / "nowhere")) == []


class Evil:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_loading_never_runs_code(tmp_path):
    folder = tmp_path / "c"
    save(str(folder), made())
    pickle.loads(pickle.dumps(Evil(str(tmp_path / "ran"))))  # what a plain unpickler does with it
    (tmp_path / "ran").rmdir()
    save(str(folder), replace(made(), state={"model": Evil(str(tmp_path / "ran"))}))
    with pytest.raises(UsageError, match="cannot be loaded safely"):
        load(str(folder))
    assert not (tmp_path / "ran").exists()


def test_damage_other_versions_and_no_checkpoint_are_told_apart(tmp_path):
    folder = tmp_path / "c"
    save(str(folder), made())
    about = (folder / "about.json").read_text()
    data = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(data[:-100])
    with pytest.raises(UsageError, match=f"has {len(data) - 100} bytes, {len(data)} were written"):
        load(str(folder))
    (folder / "state.pt").unlink()
    with pytest.raises(UsageError, match="has 0 bytes"):
        load(str(folder))
    (folder / "about.json").write_text(about.replace('"version": 2', '"version": 1'))
    with pytest.raises(UsageError, match="format version 1; this raypipe reads version 2"):
        load(str(folder))
    (folder / "about.json").write_text(about[:50])
    with pytest.raises(UsageError, match="cannot read"):
        load(str(folder))
    with pytest.raises(UsageError, match="is no checkpoint"):
        load(str(tmp_path))


def test_another_recipe_or_model_is_refused_with_the_difference(tmp_path):
    folder = str(tmp_path / "c")
    save(folder, made())
    checkpoints.check_same(folder, made().settings)
    other = {
        **made().settings,
        "recipe": {"ops": [{"op": "Resize", "height": 320}]},
        "classes": (3, 17, 90),
    }
    with pytest.raises(UsageError) as caught:
        checkpoints.check_same(folder, other)
    assert "recipe.ops.0.height: 300 there, 320 now" in str(caught.value)
    assert "classes: [3, 90] there, [3, 17, 90] now" in str(caught.value)
    assert "model.name" not in str(caught.value)


SAVING = """
import sys
from dataclasses import replace
from raypipe.models.checkpoint import name_of, save
from tests.models.test_checkpoint import made
import torch
big = made()
for step in range(1, 10**6):
    state = {"w": torch.full((500_000,), float(step))}
    now = replace(big, progress=replace(big.progress, step=step, rows=step), state=state)
    save(f"{sys.argv[1]}/{name_of(now.progress)}", now)
"""


@pytest.mark.slow
def test_a_process_killed_while_it_saves_leaves_only_whole_checkpoints(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SAVING, str(tmp_path)], cwd=ROOT)
    deadline = time.time() + 60
    while len(list(tmp_path.iterdir())) < 20:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = checkpoints.all_in(str(tmp_path))
    assert len(found) >= 18
    for folder in found:
        one = load(folder)
        assert torch.equal(one.state["w"], torch.full((500_000,), float(one.progress.step)))


def put(root: Path, attempt: str, step: int) -> Path:
    one = made(step=step, rows=10 * step)
    folder = root / attempt / checkpoints.name_of(one.progress)
    save(str(folder), one)
    return folder


def test_a_copy_that_the_user_made_of_a_checkpoint_is_never_deleted(tmp_path):
    first, second = put(tmp_path, "run-1", 1), put(tmp_path, "run-1", 2)
    copy = tmp_path / "best" / first.name
    shutil.copytree(first, copy)
    for _ in range(2):
        assert checkpoints.prune(str(tmp_path), keep=[str(second)]) == []
    assert not first.exists() and second.exists()
    assert sorted(path.name for path in copy.iterdir()) == [
        "about.json",
        "state.pt",
    ]
    assert checkpoints.prune(str(tmp_path)) == []
    assert copy.exists() and not second.exists()


def test_deleting_a_checkpoint_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    folder = put(tmp_path, "run-1", 1)
    whole = Location.delete
    monkeypatch.setattr(
        Location, "delete", lambda place: whole(place) if place.name == "about.json" else die()
    )

    def die():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.prune(str(tmp_path))
    monkeypatch.setattr(Location, "delete", whole)
    assert (folder / "state.pt").exists() and checkpoints.all_in(str(tmp_path)) == []
    assert checkpoints.prune(str(tmp_path)) == [] and not folder.exists()


def test_a_damaged_checkpoint_does_not_stop_deleting_the_others(tmp_path):
    damaged, other = put(tmp_path, "run-1", 1), put(tmp_path, "run-1", 2)
    (damaged / "about.json").write_bytes(b"\xff{")
    (line,) = checkpoints.prune(str(tmp_path))
    assert "cannot read" in line and line.endswith("was left alone.")
    assert damaged.exists() and not other.exists()
