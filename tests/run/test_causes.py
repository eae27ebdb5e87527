"""The first line of a failure is its innermost cause, of errors that Ray really raises."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import ray.data

from raypipe.run.causes import breaks, cause_of, raised_in
from raypipe.run.console import attempt
from tests.conftest import ROOT
from tests.support.clusters import environment
from tests.support.runs import quiet


class Dies:
    def __call__(self, block):
        os._exit(1)


class DiskIsFull:
    def __call__(self, block):
        try:
            raise OSError(28, "No space left on device", "/out/a.jpg")
        except OSError as error:
            raise RuntimeError("the shard could not be written") from error


class Fails:
    def __call__(self, block):
        raise KeyError("no such column")


class CannotStart:
    def __init__(self):
        raise ImportError("libGL.so.1: cannot open shared object file")

    def __call__(self, block): ...


class Hangs:
    def __call__(self, block):
        time.sleep(30)
        return block


@pytest.mark.parametrize(
    ("actor", "words"),
    [
        (Dies, "an actor was killed, from outside or for want of memory"),
        (DiskIsFull, "No space left on device: '/out/a.jpg'"),
        (Fails, "KeyError: 'no such column'"),
        (CannotStart, "ImportError: libGL.so.1: cannot open shared object file"),
        (Hangs, "Dataset execution made no progress for at least 3s"),
    ],
)
def test_the_innermost_cause_comes_first(session, capsys, actor, words):
    def execute() -> None:
        dataset = ray.data.from_blocks([pa.table({"a": [1]})])
        if actor is Hangs:
            dataset.context.execution_no_progress_timeout_s = 3
        pool = ray.data.ActorPoolStrategy(size=1)
        done = dataset.map_batches(
            actor, batch_size=None, compute=pool, max_restarts=-1, max_task_retries=1
        )
        for _ in done.iter_batches():
            pass

    with pytest.raises(breaks()) as caught:
        execute()
    assert cause_of(caught.value).startswith(words)

    def again() -> None:
        raise caught.value

    console = quiet()
    assert (
        attempt(
            again,
            kept="What is finished is in out.",
            again="The same command goes on from there.",
            console=console,
        )
        == 1
    )
    first, kept, trace = console.file.getvalue().splitlines()[:3]
    assert first.startswith(f"error: {words}")
    assert kept == "What is finished is in out. The same command goes on from there."
    assert Path(trace.rpartition(": ")[2]).read_text().count("Traceback") >= 1


def test_a_task_error_with_a_cause_of_its_own_class(session):
    @ray.remote
    def read():
        Path("/no/such/file").read_bytes()

    with pytest.raises(breaks()) as caught:
        ray.get(read.remote())
    assert cause_of(caught.value) == "No such file or directory: /no/such/file"


def test_a_node_or_a_store_that_is_gone_is_named():
    error = OSError(
        "When uploading part: AWS Error SLOW_DOWN during PutObject operation: "
        "Please reduce your request rate"
    )
    assert cause_of(error) == str(error)
    assert raised_in("nothing was raised here: so it is") is None


def test_control_characters_of_names_never_reach_the_terminal(tmp_path):
    name = "evil\x1b]0;owned\x07\x1b[31m.jpg"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(b"no image")
    command = [
        sys.executable,
        "jobs/preprocess.py",
        "--input",
        str(tmp_path / "in" / name),
        "--limit",
        "0",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, timeout=120)
    command = [sys.executable, "jobs/preprocess.py", "--input", str(tmp_path / f"no\x1b[31m{name}")]
    also = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, timeout=120)
    for out in (done, also):
        assert (
            out.returncode == 2
            and b"\x1b" not in out.stderr + out.stdout
            and b"\x07" not in out.stderr
        ), out


@pytest.mark.slow
def test_a_full_disk_is_the_first_line_of_a_job(joined, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        command = [
            sys.executable,
            "jobs/preprocess.py",
            "--input",
            "demo:80",
            "--output",
            str(disk / "out"),
            "--actors",
            "1",
        ]
        done = subprocess.run(
            [*command, "--writers", "1"],
            cwd=ROOT,
            env=joined,
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert done.returncode == 1 and line.startswith("error: No space left on device"), done.stderr
    assert "The same command goes on from there." in done.stderr and "Traceback" not in done.stderr


STARTS = """
from rich.console import Console
from raypipe.run.cluster.session import ray_session
from raypipe.run.console import attempt
from tests.support.runs import settings
from raypipe.run.preprocess import preprocessing

def start():
    # The processes of Ray Train need the agents of Ray.
    with ray_session(preprocessing(settings(input="demo:8")).stages("it"), trains=True):
        pass

raise SystemExit(attempt(start, kept="", again="", console=Console(stderr=True)))
"""


@pytest.mark.slow
def test_a_ray_that_cannot_start_is_explained_by_what_its_own_processes_said(tmp_path):
    (tmp_path / "aiohttp").mkdir()
    (tmp_path / "aiohttp/__init__.py").write_text("raise ImportError('libssl.so.9 is missing')")
    env = environment(PYTHONPATH=f"{tmp_path}:{ROOT}")
    done = subprocess.run(
        [sys.executable, "-c", STARTS],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert done.returncode == 1
    assert line.startswith("error: Ray did not start: ImportError: libssl.so.9 is missing (in /"), (
        done.stderr
    )
    assert "dashboard_agent.log" in line and "Install or mend what it names" in line
    # Preprocessing does without the agents and the dashboard.
    command = [sys.executable, "jobs/preprocess.py", "--input", "demo:8", "--actors", "1"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
