"""`raypipe runs | watch | scale` beside a real run, in a real terminal."""

import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import files
from tests.support.clusters import environment, wait_for
from tests.support.terminals import Terminal

ROOT = Path(__file__).parent.parent.parent
RUN = "watched-1"
IMAGES = 160
"""Each waits 1 s in each stage, so two actors have work for 80 s."""
CLI = [sys.executable, "-m", "raypipe.cli"]
ENV = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 32)


def raypipe(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*CLI, *arguments], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120
    )


def address_of(run: subprocess.Popen) -> str | None:
    """Where the Ray that `run` started for itself listens, once it does."""
    for process in psutil.Process(run.pid).children(recursive=True):
        found = re.search(r"raylet .*--gcs-address=(\S+)", " ".join(process.cmdline()))
        if found:
            return found[1]
    return None


@pytest.fixture
def run(tmp_path):
    """A run whose actors wait: their number decides its speed on any machine. With its address."""
    job = [
        sys.executable,
        "jobs/preprocess.py",
        "--input",
        f"demo:{IMAGES}",
        "--output",
        str(tmp_path / "out"),
        "--run-id",
        RUN,
    ]
    job += [
        "--actors",
        "1",
        "--writers",
        "1",
        "--shard-rows",
        "1",
        "--read-ms",
        "1000",
        "--store-ms",
        "1000",
    ]
    process = subprocess.Popen(
        job, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: address_of(process), process)
        address = address_of(process)
        # Both stages have begun. Each `raypipe runs` would take 3 s of CPU.
        wait_for(lambda: any((tmp_path / "out").glob("_raypipe/journal/*.json")), process)
        yield process, address
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_run_is_listed_watched_and_scaled_from_outside_until_it_ends(run, tmp_path):
    job, address = run
    there = ("--address", address)
    listed = raypipe("runs", *there, "--json")
    (record,) = [json.loads(line) for line in listed.stdout.splitlines()]
    assert (record["run_id"], record["images"], record["output"]) == (
        RUN,
        IMAGES,
        str(tmp_path / "out"),
    )

    once = raypipe("watch", *there, "--once")
    assert once.returncode == 0, once
    assert re.search(rf"/{IMAGES} images, .*preprocess: actors", once.stdout), once
    assert once.stderr == ""

    scaled = raypipe("scale", RUN, "preprocess=2", *there)
    assert (scaled.returncode, scaled.stderr) == (0, "")
    assert "preprocess=2 wanted" in scaled.stdout
    for refused, why in (
        (("writer=2",), "no stage 'writer'"),
        (("no-such-run", "write=2"), RUN),
    ):
        done = raypipe("scale", *refused, *there)
        assert done.returncode == 2 and why in " ".join(done.stderr.split()), done
        assert "Traceback" not in done.stderr

    with Terminal([*CLI, "watch", RUN, *there], env=ENV, cwd=ROOT) as terminal:
        terminal.shows(r"run watched-1 .*▶ +preprocess +2 .*quit", 120)
        terminal.press("\x1b[B+")
        terminal.shows(r"▶ +write +2 .*scaled +write 1 → 2 .*by user.*write: 2 wanted", 120)
        terminal.press("----")
        terminal.shows(r"write=0.*at least 1 actor.*quit")
        terminal.press("\x03")
        assert terminal.ends() == 130
        assert terminal.restored and "Traceback" not in terminal.output
    assert job.poll() is None, "the run goes on"

    with Terminal([*CLI, "watch", *there], env=ENV, cwd=ROOT) as terminal:
        terminal.shows("quit", 120)
        assert (
            raypipe("scale", "write=5", "preprocess=5", *there).returncode == 0
        )  # to its end sooner
        terminal.shows(r"write +\d+ → 5 |write +5 ")
        assert terminal.ends(300) == 0
        assert terminal.restored and "Traceback" not in terminal.output
        left = " ".join(terminal.output.rsplit("\x1b[?1049l", 1)[1].split())
        assert "The run watched-1 has ended" in left and re.search(
            rf"Last seen at \d+ of {IMAGES} images", left
        )

    _, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert len(files(tmp_path / "out")) == IMAGES
    report = json.loads((tmp_path / "out/_raypipe/report.json").read_text())
    changes = [
        (event["stage"], event["from"], event["to"], event["by"])
        for event in report["scale_events"]
    ]
    assert changes[:3] == [
        ("preprocess", 1, 2, "user"),
        ("write", 1, 2, "user"),
        ("write", 2, 1, "user"),
    ]
    assert changes[3:] == [("write", 1, 5, "user"), ("preprocess", 2, 5, "user")]


def test_where_there_is_no_cluster_the_commands_say_so_and_what_to_do():
    done = subprocess.run(
        [*CLI, "runs"],
        cwd=ROOT,
        env=environment(RAY_ADDRESS="127.0.0.1:1"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert (
        "No Ray cluster answers at '127.0.0.1:1'" in done.stderr
        and "Correct --address or RAY_ADDRESS" in " ".join(done.stderr.split())
    )
    assert "Traceback" not in done.stderr
