"""Which runs go on: real processes, real files, and the Ray of this process."""

import json
import os
import subprocess
import sys
import time

import pytest

from raypipe import UsageError
from raypipe.run.live import control, registry
from raypipe.run.live.registry import entries, registered
from raypipe.run.preprocess import start
from tests.conftest import ROOT
from tests.support.clusters import environment
from tests.support.runs import quiet, settings

RUN = (
    "import sys, time\nfrom raypipe.run.live.registry import registered\n"
    "with registered(sys.argv[1], address='127.0.0.1:1', output='/there'):\n"
    "    print('on', flush=True)\n    time.sleep(600)"
)


@pytest.fixture
def other():
    """The process of another run, whose Ray does not answer."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, "other"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "on\n"
    yield process
    process.kill()
    process.wait()


def test_a_run_is_there_as_long_as_its_process(other):
    with registered("mine", address="127.0.0.1:2", output=None):
        found = {entry.run_id: entry for entry in entries()}
        assert found.keys() == {"mine", "other"} and found["other"].pid == other.pid
    assert [entry.run_id for entry in entries()] == ["other"]
    other.kill()
    other.wait()
    assert entries() == [] and not list(registry.folder().glob("*.json"))


def test_files_that_are_no_entries_are_passed_over(other):
    for number, content in enumerate((b"", b"[]", b'{"pid": "x"}', b"\xff", b'{"run_id": "a"}')):
        (registry.folder() / f"{number}.json").write_bytes(content)
    try:
        assert [entry.run_id for entry in entries()] == ["other"]
    finally:
        for number in range(5):
            (registry.folder() / f"{number}.json").unlink()


def test_a_run_of_somebody_else_is_never_watched_or_scaled_by_mistake(session, other, tmp_path):
    run = start(
        settings(
            input="demo:400", output=tmp_path / "out", shard_rows=4, read_ms=20.0, run_id="mine"
        ),
        console=quiet(),
    )
    try:
        run.live()
        with pytest.raises(
            UsageError,
            match=r"2 runs are in progress:\n  \w+.*\n  \w+.*\nNothing was changed. Say which",
        ):
            control.attach()
        assert control.attach("mine").live()["run_id"] == "mine"
        with pytest.raises(UsageError, match="No run 'none' is in progress"):
            control.attach("none")
        assert json.loads(next(registry.folder().glob("mine-*.json")).read_text())["output"] == str(
            tmp_path / "out"
        )
    finally:
        run.stop()
        with pytest.raises(KeyboardInterrupt):
            run.wait()
    deadline = time.monotonic() + 60  # Ray takes a moment to forget an actor
    while [place.run_id for place in control.places()] != ["other"]:
        assert time.monotonic() < deadline, control.places()
        time.sleep(0.1)


def test_watch_without_a_run_waits_for_one(tmp_path):
    env = environment(XDG_CACHE_HOME=str(tmp_path))
    command = [sys.executable, "-m", "raypipe.cli", "watch"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and "Waiting for one" in process.stdout.readline()
        command = [sys.executable, "-c", RUN, "late"]
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL) as late:
            try:
                _, said = process.communicate(timeout=60)
                assert (
                    process.returncode == 2 and "No Ray cluster answers at '127.0.0.1:1'" in said
                )  # it tried that run's
            finally:
                late.kill()
    finally:
        process.kill()
        process.wait()


def test_scale_without_a_run_says_so_at_once(tmp_path):
    command = [sys.executable, "-m", "raypipe.cli", "scale", "preprocess=2"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(XDG_CACHE_HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "No run is in progress here" in done.stderr


def test_entries_that_nobody_renews_any_more_are_ignored_and_removed():
    """Of a host before it was started again, or of a container that is gone."""
    with registered("mine", address="127.0.0.1:2", output=None):
        (path,) = registry.folder().glob("mine-*.json")
        foreign = json.loads(path.read_text()) | {"boot": "another", "run_id": "foreign"}
        other = registry.folder() / "foreign.json"
        other.write_text(json.dumps(foreign))
        assert {entry.run_id for entry in entries()} == {"mine", "foreign"}
        long_ago = time.time() - registry.FREE_AFTER_S - 1
        os.utime(other, (long_ago, long_ago))
        assert {entry.run_id for entry in entries()} == {"mine"} and not other.exists()


def test_an_entry_is_renewed_while_the_run_goes_on(monkeypatch):
    monkeypatch.setattr(registry, "RENEW_S", 0.05)
    with registered("mine", address="127.0.0.1:2", output=None):
        (path,) = registry.folder().glob("mine-*.json")
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime < 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
