"""The end of a run: interrupted, killed, or made again from the journal."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from raypipe.run.live.control import Control
from raypipe.run.preprocess import run, verdict_on
from tests.conftest import ROOT, files, tree
from tests.support.clusters import environment
from tests.support.runs import quiet, settings

pytestmark = pytest.mark.xdist_group("claim")  # one process makes the output that they start from


def interrupted(*arguments: str, when: str, env: dict[str, str]) -> tuple[int, str]:
    """The status of a job that gets Ctrl-C when it has said `when`, and what it said."""
    command = [sys.executable, "jobs/preprocess.py", *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if when in line:
            os.kill(process.pid, signal.SIGINT)
            break
    said += process.stderr.read()
    return process.wait(), said


@pytest.mark.slow
def test_what_is_said_after_an_interruption_never_deletes_what_is_finished(wanted, joined):
    root = Path(wanted.writing.output)
    before = tree(root)
    common = (
        "--input",
        wanted.source.input,
        "--output",
        wanted.writing.output,
        "--shard-rows",
        "4",
        "--no-resume",
        "--actors",
        "1",
        "--writers",
        "1",
    )
    status, said = interrupted(*common, when="Starting Ray", env=environment())
    assert status == 130 and said.rstrip().endswith("Interrupted. Nothing was changed."), said
    assert tree(root) == before
    status, said = interrupted(*common, "--read-ms", "200", when="Watch it:", env=joined)
    assert status == 130, said
    assert "Interrupted. The same command without --no-resume goes on from there." in said


def test_an_end_that_is_missing_is_made_again_from_the_journal(wanted):
    state = Path(wanted.writing.output) / "_raypipe"
    whole = json.loads((state / "report.json").read_text())
    rejects = pq.read_table(state / "rejects.parquet")
    for name in ("report.json", "report.html", "rejects.parquet"):
        (state / name).unlink()
    outcome = run(wanted, console=quiet())
    again = json.loads((state / "report.json").read_text())
    assert again == outcome.report and again.keys() == whole.keys()
    for name in (
        "images_in",
        "images_out",
        "images_rejected",
        "images_unread",
        "rejects_by_reason",
        "shards",
    ):
        assert again[name] == whole[name], name
    for name in ("wall_s", "images_per_s", "steady_images_per_s", "cpu_percent", "setup_s"):
        assert again[name] is None and whole[name] is not None, name
    assert pq.read_table(state / "rejects.parquet").equals(rejects)
    assert (state / "report.html").exists() and verdict_on(outcome, wanted) is None
    assert run(wanted, console=quiet()).report is None  # once is enough


def test_an_end_that_does_not_cover_all_shards_is_made_again(wanted):
    place = Path(wanted.writing.output) / "_raypipe/report.json"
    report = json.loads(place.read_text())
    for shards in ([], [[0, 2]], "damaged", None):
        place.write_text(json.dumps(report | {"shards": shards}))
        assert run(wanted, console=quiet()).report["shards"] == report["shards"]


class KillsCollector:
    def __init__(self) -> None:
        self.done = False

    def __call__(self, control: Control) -> None:
        ray.kill(control._collector)
        self.done = True


def test_a_collector_that_dies_ends_neither_the_run_nor_its_report(session, made, tmp_path):
    kills = KillsCollector()
    wanted = settings(
        input=made / "in",
        output=tmp_path / "out",
        shard_rows=4,
        max_reject_fraction=0.1,
        read_ms=5.0,
    )
    report = run(wanted, console=quiet(), began=kills).report
    assert kills.done and (report["images_out"], report["images_rejected"]) == (23, 1)
    assert report["stages"] == [] and "collects it was killed" in report["verdict"]["reason"]
    assert report["wall_s"] > 0 and (tmp_path / "out/_raypipe/report.html").exists()


@pytest.mark.slow
def test_a_driver_that_is_killed_before_its_end_loses_nothing(joined, tmp_path):
    """Killed in the window between the last shard and the report, which a slow disk makes long."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "jobs/preprocess.py",
        "--input",
        "demo:40",
        "--output",
        str(out),
        "--actors",
        "1",
        "--writers",
        "1",
    ]
    process = subprocess.Popen(command, cwd=ROOT, env=joined, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "_raypipe/rejects.parquet").exists():
        with contextlib.suppress(OSError):
            shards = len(
                set(pq.read_table(out / "_raypipe/work.parquet").column("shard").to_pylist())
            )
            if len(list(out.glob("_raypipe/journal/*.json"))) == shards:
                break
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(
        command, cwd=ROOT, env=joined, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "_raypipe/report.json").read_text())
    assert (report["images_in"], report["images_out"]) == (40, 40) == (40, len(files(out)))
